"""Whatever a damaged file holds, it is read or refused in one line, and takes no memory that it promises.

``WAN_TRT_FUZZED`` sets the number of damaged files of each kind.
"""

import json
import os
import random
import resource
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from engines.inspect.log import read_log
from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.part_files import read_part
from export.lora.inspection import inspect_weights
from export.lora.merge import LoraChoice, open_lora
from export.quantise.input_scales import read_input_scales
from export.quantise.inputs import read_inputs
from export.synth.checkpoint import synthesise
from runtime.built_for import check_plans
from runtime.image import open_image
from runtime.prompts import read_prompts
from runtime.recipe import read_recipe
from runtime.signature import check_signature
from runtime.tokenizer import Tokenizer
from runtime.video import encode_video
from tests.validate.report.test_extras import BENCH
from tests.wan22.test_stamp import STAMP
from triton_repo.job_request import parse_request
from triton_repo.schema import INPUTS, NUMPY
from triton_repo.settings import Limits
from validate.bench.result import read_bench
from validate.gate import read_gates
from wan22.block_layout import BlockLayout, Place, read_block_layout, write_block_layout
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.onnx_file import check_graphs
from wan22.specs import spec_named
from wan22.stamp import check_stamp, read_name
from wan_trt.recipes.noise_file import read_noise

SPEC = spec_named("ti2v-5b-tiny")
LORA = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 256), "blocks.0.ffn.0.lora_B.weight": torch.ones(512, 2)}
ROUNDS = int(os.environ.get("WAN_TRT_FUZZED", "60"))
GROWTH_MAX_BYTES = 2**30


def save_gguf(path):
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_tensor("w", gguf.quantize(torch.randn(64, 64).numpy(), gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.add_tensor("b", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_weights(path):
    matrix = torch.randn(64, 64)
    fp8 = {"blocks.0.ffn.0.weight": matrix.to(torch.float8_e4m3fn), "blocks.0.ffn.0.scale_weight": torch.tensor(2.0)}
    vae = {"conv1.weight": torch.nn.Parameter(matrix), "conv2.weight": matrix.bfloat16()}
    match path.name:
        case "lora.safetensors":
            safetensors.torch.save_file(LORA | {"blocks.0.ffn.0.alpha": torch.tensor(1)}, path)
        case "fp8.safetensors":
            safetensors.torch.save_file(fp8 | {"spiece_model": torch.zeros(9).byte()}, path)
        case "lora.pt":
            torch.save({"state_dict": LORA, "step": 3}, path)
        case "vae.pth":
            torch.save(vae, path)
        case "x.gguf":
            save_gguf(path)


def weights(name):
    def make(folder, _):
        path = folder / name
        save_weights(path)
        choice = LoraChoice(path)
        return path, [
            lambda: inspect_weights(path),
            lambda: read_part(path, "high_noise"),
            lambda: open_lora(choice, SPEC),
        ]

    return make


def adapter(folder, _):
    safetensors.torch.save_file(LORA, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"ffn.0": 2}, "target_modules": ["ffn.0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_config.json", [lambda: open_lora(LoraChoice(folder), SPEC)]


def checkpoint(layout, name):
    def make(folder, _):
        synthesise(SPEC, folder / "c", layout, seed=0)
        return folder / "c" / name, [lambda: open_checkpoint(folder / "c")]

    return make


def means(folder, _):
    path = folder / "means.safetensors"
    named = {"dit.blocks.0.ffn.0.input_mean": torch.ones(256), "dit.blocks.0.ffn.0.weight_scale": torch.ones(())}
    safetensors.torch.save_file(named, path)
    return path, [lambda: read_inputs(path, SPEC)]


def manifest(kind):
    def make(folder, flow_of):
        copied = shutil.copytree(getattr(flow_of(SPEC.name), kind), folder / "b", copy_function=os.link)
        path = copied / "bundle.json"
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text)
        of = "graphs" if kind == "bundle" else "engines"
        return path, [lambda: check_graphs(open_bundle(copied, of)), lambda: check_plans(open_bundle(copied, of))]

    return make


def graph(folder, flow_of):
    opened = open_bundle(flow_of(SPEC.name).bundle, "graphs")
    copied = shutil.copytree(opened.folder, folder / "b")
    path = copied / "text_encoder.onnx"
    return path, [lambda: check_graphs(type(opened)(copied, opened.manifest))]


def tokenizer(folder, flow_of):
    path = folder / "tokenizer.json"
    shutil.copyfile(flow_of(SPEC.name).bundle / "tokenizer" / path.name, path)
    return path, [lambda: Tokenizer(folder).encode("a red ball")]


def signature(folder, flow_of):
    copied = shutil.copytree(flow_of(SPEC.name).bundle, folder / "b")
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", folder / "key"], check=True)
    subprocess.run(["openssl", "pkey", "-in", folder / "key", "-pubout", "-out", folder / "public"], check=True)
    (copied / "bundle.sig").write_bytes(bytes(64))
    return folder / "public", [lambda: check_signature(copied, folder / "public")]


def stamp(folder, _):
    path = folder / "plan"
    path.write_bytes(b"ftrt" + STAMP.name.encode() + b"\x01")
    return path, [lambda: check_stamp("plan", read_name(path), STAMP, "wan-trt build")]


def layout(folder, _):
    path = folder / "layout.json"
    places = Place("a", 0, 256, (8, 8)), Place("b", 256, 256, (64,))
    write_block_layout(path, BlockLayout(places, places, 2, 4096, 4096, 256))
    return path, [lambda: read_block_layout(path)]


def image(ending):
    def make(folder, _):
        path = folder / f"x.{ending}"
        Image.effect_noise((24, 16), 90).convert("RGB").save(path)
        return path, [lambda: open_image(path).convert("RGB").load(), lambda: open_image(path.read_bytes())]

    return make


def noise(ending):
    def make(folder, _):
        path, array = folder / f"x.{ending}", np.ones((16, 2, 4, 4), np.float32)
        if ending == "pt":
            torch.save(torch.from_numpy(array), path)
        elif ending == "npz":
            np.savez(path, array)
        else:
            np.save(path, array)
        return path, [lambda: read_noise(path)]

    return make


def video(ending):
    def make(folder, _):
        path, note = folder / f"x.{ending}", json.dumps({"wan_trt": "1", "prompt": "x"})
        encode_video([np.zeros((1, 3, 1 if ending == "png" else 5, 32, 32), np.float32)], path, 16, 8, note)
        return path, [lambda: read_recipe(path)]

    return make


def text(content, read):
    def make(folder, _):
        path = folder / "x"
        path.write_text(content)
        return path, [lambda: read(path)]

    return make


LOG = (
    "Layers:\nName: conv, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,2], Format/Datatype: Half }]\n"
    "I/O Tensors:\n"
)
SCALES = json.dumps({"blocks.0.ffn.net.2": {"input_scale": 0.02, "weight_scale": 0.001}})
GATES = "[validate]\nchecks.failed.max = 0\n[bench]\nhigh_noise.speedup.min = 1\n"
PROMPTS = '# a comment\nA red ball\n{"prompt": "A cat", "image": "cat.jpg"}\n'
KINDS = {
    **{name: weights(name) for name in ("lora.safetensors", "fp8.safetensors", "lora.pt", "vae.pth", "x.gguf")},
    "adapter": adapter,
    "official config": checkpoint("official", "config.json"),
    "diffusers index": checkpoint("diffusers", "model_index.json"),
    "diffusers config": checkpoint("diffusers", "transformer/config.json"),
    "means": means,
    "scales": text(SCALES, lambda path: read_input_scales(path, SPEC)),
    "manifest": manifest("bundle"),
    "engines": manifest("engines"),
    "graph": graph,
    "tokenizer": tokenizer,
    "signature": signature,
    "stamp": stamp,
    "layout": layout,
    **{ending: image(ending) for ending in ("png", "jpg", "webp")},
    **{f"noise.{ending}": noise(ending) for ending in ("npz", "npy", "pt")},
    **{f"video.{ending}": video(ending) for ending in ("mp4", "webm", "png")},
    "gates": text(GATES, lambda path: read_gates(path, "validate", ["checks.failed"])),
    "bench": text(json.dumps(BENCH), read_bench),
    "prompts": text(PROMPTS, lambda path: read_prompts(path, "optional")),
    "log": text(LOG, read_log),
}


def damaged(content, chance):
    """Bytes overwritten, inserted, removed, or the end cut off; most often where headers lie."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 6))):
        near = chance.choice((40, 400, len(content)))
        place = min(chance.randrange(near), len(content) - 1)
        place = len(content) - 1 - place if chance.random() < 0.3 else place
        kind = chance.randrange(6)
        if kind == 0:
            content[place] = chance.randrange(256)
        elif kind == 1:
            content[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff\xff\xff\xff\xff"))
        elif kind == 2:
            content[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            del content[place : place + chance.randrange(1, 33)]
        elif kind == 4:  # what readers of text stumble over
            content[place:place] = chance.choice(
                (b"[" * 9999, b"-1", b"9" * 400, b"null", b'"', b"\\ud800", b"NaN", b"{}")
            )
        elif chance.random() < 0.2:
            del content[place:]
        content = content or bytearray(b"x")
    return bytes(content)


def check(call):
    try:
        call()
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(tmp_path, flow_of, kind):
    path, calls = KINDS[kind](tmp_path, flow_of)
    chance, content = random.Random(kind), path.read_bytes()
    for call in calls:
        check(call)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(ROUNDS):
        path.write_bytes(damaged(content, chance))
        for call in calls:
            try:
                check(call)
            except BaseException as error:
                raise AssertionError(f"damaged file {number} of {kind}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH_MAX_BYTES


def test_random_requests_are_taken_or_refused(tiny_engines):
    chance, limits = random.Random(0), Limits(128 * 128, 9)
    opened = open_bundle(tiny_engines, "engines").manifest
    numbers = (0, 1, -1, 5, 64, 2**31 - 1, -(2**31), 3.5, float("nan"), float("inf"), 1e-45)
    words = (b"x", b"", b"\xff", b"\0", b"a" * 99, b"unipc", b"euler", b"official", "狐".encode() * 600)
    for _ in range(10 * ROUNDS):
        tensors = {}
        for field in chance.sample(INPUTS, chance.randrange(1, 9)):
            if field.dtype == "STRING":
                value = np.array([chance.choice(words)], np.object_)
            elif field.dtype == "UINT8":
                value = np.frombuffer(chance.randbytes(chance.randrange(64)), np.uint8)
            else:
                picked = chance.choice(numbers)
                whole = field.dtype != "FP32"
                value = np.array(
                    [int(picked) if whole and abs(picked) < 2**31 else 7 if whole else picked], NUMPY[field.dtype]
                )
            tensors[field.name] = value
        check(lambda given=tensors: parse_request(given, opened, limits))
