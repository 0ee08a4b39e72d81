"""Every row of the table in docs/checkpoints.md: its command, run on small files, exports what they hold."""

import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open

from export.checkpoint.keys import llama_names
from export.synth.checkpoint import synthesise
from export.synth.tokenizer import trained_model
from tests.export.checkpoint.forms import (
    all_in_one,
    comfy,
    comfy_text_encoder,
    format_1,
    fp8_by_row,
    fp8_scaled,
    save,
    tensors_of,
    write_gguf,
)
from tests.export.test_calibrated import written as modelopt
from wan22.bundle import open_bundle
from wan22.specs import spec_named
from wan_trt.cli import app

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"
ROWS = re.findall(r"^\| (.+?) \| `(wan-trt export [^`]*)` \|$", PAGE.read_text(), re.M)
T2V, TI2V = spec_named("t2v-a14b-tiny"), spec_named("ti2v-5b-tiny")
FFN = "blocks.0.ffn.0.bias"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for spec, layout in ((T2V, "official"), (T2V, "diffusers"), (TI2V, "official")):
        synthesise(spec, root / spec.name / layout, layout, seed=7)
    return root


class Files:
    """The small files of one row in the current folder, and the tensors that the export must hold, by part."""

    def __init__(self, bases, monkeypatch):
        self.bases, self.monkeypatch = bases, monkeypatch
        self.t2v, self.ti2v = bases / T2V.name / "official", bases / TI2V.name / "official"
        self.expected = {}

    def expect(self, folder, *parts, dtype=torch.float32):
        for part in parts:
            self.expected[part] = {name: tensor.to(dtype) for name, tensor in tensors_of(folder, part).items()}

    def folder(self, layout="official"):
        shutil.copytree(self.bases / T2V.name / layout, "FOLDER")
        self.expect(self.t2v, "high_noise", "low_noise", "vae")

    def text_encoder_and_vae(self, base):
        comfy_text_encoder(base, Path("UMT5.safetensors"))
        save(Path("VAE.safetensors"), {k: t.bfloat16() for k, t in tensors_of(base, "vae").items()})
        self.expect(base, "text_encoder", dtype=torch.float16)
        self.expect(base, "vae", dtype=torch.bfloat16)

    def ggufs(self):
        for expert, name in (("high_noise", "HIGH.gguf"), ("low_noise", "LOW.gguf")):
            self.expected[expert] = write_gguf(Path(name), tensors_of(self.t2v, expert))

    # by a part of the row's first column

    def official_folder(self):
        self.folder()

    def diffusers_folder(self):
        self.folder("diffusers")
        for path in [
            *Path("FOLDER/transformer").glob("*-of-*"),
            Path("FOLDER/vae/diffusion_pytorch_model.safetensors"),
        ]:
            path.rename(path.with_name(path.name.replace(".safetensors", ".bf16.safetensors")))
        index = Path("FOLDER/transformer/diffusion_pytorch_model.safetensors.index.json")
        text = index.read_text().replace("00002.safetensors", "00002.bf16.safetensors")
        index.with_name("diffusion_pytorch_model.safetensors.index.bf16.json").write_text(text)
        index.unlink()

    def hub_name(self):
        listed = [path.relative_to(self.t2v).as_posix() for path in self.t2v.rglob("*")]
        self.monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_a, **_k: listed)
        self.monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: str(self.t2v))
        self.expect(self.t2v, "high_noise", "low_noise", "vae")

    def cache_folder(self):
        cache = Path("models--Wan-AI--Wan2.2-T2V-A14B")
        shutil.copytree(self.t2v, cache / "snapshots" / "abc")
        self.expect(self.t2v, "high_noise", "low_noise", "vae")

    def comfy_folder(self):
        comfy(self.t2v, Path("models"), "t2v")
        self.expect(self.t2v, "high_noise", "low_noise", "text_encoder", dtype=torch.float16)

    def comfy_files(self):
        self.text_encoder_and_vae(self.t2v)
        tensors, self.expected["high_noise"] = fp8_scaled(tensors_of(self.t2v, "high_noise"))
        save(Path("HIGH.safetensors"), tensors)
        low = tensors_of(self.t2v, "low_noise")
        self.expected["low_noise"] = format_1(low, Path("LOW.safetensors"), in_header=True)

    def other_files(self):
        self.text_encoder_and_vae(self.t2v)
        self.expected["high_noise"] = fp8_by_row(tensors_of(self.t2v, "high_noise"), Path("HIGH.safetensors"))
        low = {f"model.{name}": tensor for name, tensor in tensors_of(self.t2v, "low_noise").items()}
        torch.save({"state_dict": low}, "LOW.pth")
        self.expect(self.t2v, "low_noise")

    def single_5b(self):
        self.text_encoder_and_vae(self.ti2v)
        save(Path("TI2V.safetensors"), {k: t.half() for k, t in tensors_of(self.ti2v, "dit").items()})
        self.expect(self.ti2v, "dit", dtype=torch.float16)

    def all_in_one(self):
        all_in_one(self.ti2v, Path("AIO.safetensors"))
        self.expect(self.ti2v, "dit", "text_encoder", "vae", dtype=torch.float16)

    def gguf(self):
        self.text_encoder_and_vae(self.t2v)
        self.ggufs()

    def gguf_text_encoder(self):
        self.gguf()
        text = tensors_of(self.t2v, "text_encoder")
        self.expected["text_encoder"] = write_gguf(Path("UMT5.gguf"), text, llama_names(T2V), "t5encoder")
        shutil.copytree(self.t2v / "google", "google")

    def gguf_tokenizer(self):
        self.gguf()
        text, model = tensors_of(self.t2v, "text_encoder"), trained_model()
        self.expected["text_encoder"] = write_gguf(Path("UMT5.gguf"), text, llama_names(T2V), "t5encoder", model)

    def one_part(self):
        self.folder()
        save(Path("VAE.safetensors"), {k: t.bfloat16() for k, t in tensors_of(self.t2v, "vae").items()})
        self.expect(self.t2v, "vae", dtype=torch.bfloat16)

    def file_and_precision(self):
        self.folder()
        self.ggufs()
        self.expected = {"low_noise": {name: t.numpy() for name, t in tensors_of(self.t2v, "low_noise").items()}}

    def distilled(self):
        self.folder()
        for path in Path("FOLDER/high_noise_model").glob("diffusion_pytorch_model*"):
            path.unlink()
        target = Path("FOLDER/high_noise_model/wan2.2_t2v_A14b_high_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors")
        self.expected["high_noise"] = fp8_by_row(tensors_of(self.t2v, "high_noise"), target)

    def modelopt(self):
        modelopt(Path("FOLDER"), "shared")

    def lora(self):
        self.folder()
        save(Path("STYLE.safetensors"), {f"diffusion_model.{FFN[:-5]}.diff_b": torch.ones(512)})
        for expert in ("high_noise", "low_noise"):
            self.expected[expert][FFN] = self.expected[expert][FFN] + 0.8

    def loras(self):
        self.folder()
        for expert, name, size in (("high_noise", "HIGH", 1.0), ("low_noise", "LOW", 2.0)):
            save(Path(f"{name}.safetensors"), {f"diffusion_model.{FFN[:-5]}.diff_b": size * torch.ones(512)})
            self.expected[expert][FFN] = self.expected[expert][FFN] + size


PREPARED = {
    "official folder": Files.official_folder,
    "-Diffusers folder": Files.diffusers_folder,
    "a hub name": Files.hub_name,
    "a `models--": Files.cache_folder,
    "ComfyUI's `models/`": Files.comfy_folder,
    "ComfyUI's files, by name": Files.comfy_files,
    "other single files": Files.other_files,
    "the 5B as a single file": Files.single_5b,
    "an all-in-one file": Files.all_in_one,
    "GGUF of the transformers": Files.gguf,
    "GGUF as the text encoder": Files.gguf_tokenizer,
    "a text encoder without": Files.gguf_text_encoder,
    "a checkpoint, and one file": Files.one_part,
    "a file and a precision": Files.file_and_precision,
    "LightX2V or any other": Files.distilled,
    "ModelOpt FP8": Files.modelopt,
    "a LoRA, LoHa": Files.lora,
    "a LoRA for each": Files.loras,
}
IN_FP8 = {"a file and a precision": ["high_noise"], "ModelOpt FP8": ["dit"]}


def test_every_row_has_files_and_all_files_a_row():
    assert [next((key for key in PREPARED if what.startswith(key)), what) for what, _ in ROWS] == list(PREPARED)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "command"), ROWS, ids=[what[:40] for what, _ in ROWS])
def test_the_command_exports_what_the_files_hold(what, command, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = Files(bases, monkeypatch)
    key = next(key for key in PREPARED if what.startswith(key))
    PREPARED[key](files)
    with pytest.raises(SystemExit) as left:
        app(shlex.split(command)[1:])
    assert left.value.code == 0
    for part, tensors in files.expected.items():
        found = held(tmp_path / "onnx", "vae_decoder" if part == "vae" else part)
        shared = tensors.keys() & found.keys()
        assert len(shared) >= len(tensors) if part != "vae" else shared
        for name in shared:
            np.testing.assert_array_equal(found[name], torch.as_tensor(tensors[name]).float().numpy(), name)
    components = open_bundle(tmp_path / "onnx", "graphs").manifest.components
    assert [each.name for each in components if each.precision.quantised] == IN_FP8.get(key, [])


def held(bundle, part):
    with safe_open(bundle / f"{part}.safetensors", "pt") as stream:
        return {name: stream.get_tensor(name).float().numpy() for name in stream.keys()}  # noqa: SIM118 -- not a dictionary
