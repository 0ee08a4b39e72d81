"""A checkpoint that was quantised and calibrated for FP8 runs as its publisher made it."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.keys import diffusers_names
from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import spec_named

SPEC = spec_named("ti2v-5b-tiny")
THEIRS = {name: theirs.removesuffix(".weight") for name, theirs in diffusers_names("dit", SPEC).items()}
ALONE = ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """ModelOpt's FP8, where q, k and v share a scale."""
    return written(tmp_path_factory.mktemp("modelopt") / "checkpoint", "shared")


def written(folder, scaling, blocks=1):
    """ModelOpt's FP8 in the -Diffusers layout, and its tensors: block 0 is quantised, block 1 is not.

    ``scaling``: q, k and v have "shared" scales, their "own", or every matrix has one for each of its "rows". With two
    ``blocks`` both are quantised, and no inputs have been measured.
    """
    synthesise(SPEC, folder, "diffusers", seed=3)
    weights = open_checkpoint(folder).weights["dit"]
    tensors = {}
    scales = {"self_attn": 0.0, "cross_attn": 0.0}
    for module in scales:
        parts = [weights.read(f"blocks.0.{module}.{part}.weight") for part in "qkv"]
        scales[module] = max(float(np.abs(part).max()) for part in parts) / 448
    for name in weights.names():
        array = torch.from_numpy(np.array(weights.read(name), np.float32))
        block, _, linear = name.removeprefix("blocks.").removesuffix(".weight").partition(".")
        quantised = name.startswith("blocks.") and int(block) < blocks
        if quantised and name.endswith(".weight") and linear in DIT_LINEARS_PER_BLOCK:
            shared = scales.get(linear.split(".")[0]) if linear[-1] in "qkv" and scaling == "shared" else None
            scale = torch.tensor(shared if shared is not None else float(array.abs().max()) / 448 * 1.5)
            scale = array.abs().amax(1, keepdim=True) / 448 if scaling == "rows" else scale
            tensors[f"{THEIRS[name]}.weight"] = (array / scale).to(torch.float8_e4m3fn)
            tensors[f"{THEIRS[name]}.weight_scale"] = scale.clone()
            if blocks == 1:
                tensors[f"{THEIRS[name]}.input_scale"] = torch.tensor(0.02 + 0.001 * len(linear))
        else:
            tensors[diffusers_names("dit", SPEC)[name]] = array.bfloat16()
    for path in (folder / "transformer").glob("diffusion_pytorch_model*"):
        path.unlink()
    safetensors.torch.save_file(tensors, folder / "transformer/diffusion_pytorch_model.safetensors")
    return folder, tensors


def exported(folder, target, **options):
    return export_checkpoint(folder, target, ExportOptions(Precision.FP8, **options))


def weights_of(bundle):
    """Name → array of the transformer's file; FP8 as its bytes."""
    tensors = safetensors.torch.load_file(bundle.folder / "dit.safetensors")
    return {k: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t.float() for k, t in tensors.items()}


def test_stored_codes_go_into_the_graph_bit_for_bit(calibrated, tmp_path):
    folder, tensors = calibrated
    found = weights_of(exported(folder, tmp_path / "onnx"))
    for linear in ALONE:
        theirs = THEIRS[f"blocks.0.{linear}.weight"]
        assert torch.equal(found[f"blocks.0.{linear}.weight"], tensors[f"{theirs}.weight"].view(torch.uint8))
        scales = found[f"blocks.0.{linear}.weight_scale"]
        assert torch.equal(scales, tensors[f"{theirs}.weight_scale"].expand(len(scales)))
    for joined, parts in (("self_attn.qkv", "qkv"), ("cross_attn.kv", "kv")):
        module = joined.split(".")[0]
        theirs = [tensors[f"{THEIRS[f'blocks.0.{module}.{part}.weight']}.weight"] for part in parts]
        assert torch.equal(found[f"blocks.0.{joined}.weight"], torch.cat(theirs).view(torch.uint8))


@pytest.mark.parametrize("scaling", ["own", "rows"])
def test_codes_with_scales_for_their_rows_are_kept_too(tmp_path, scaling):
    """LightX2V stores a scale for every row; ModelOpt may give q, k and v scales of their own."""
    folder, tensors = written(tmp_path / "checkpoint", scaling)
    found = weights_of(exported(folder, tmp_path / "onnx"))
    stored = ("self_attn.q k v", "self_attn.o", "cross_attn.q", "cross_attn.k v", "cross_attn.o", "ffn.0", "ffn.2")
    for first, *more in map(str.split, stored):
        module, parts = first.rpartition(".")[0], (first.rpartition(".")[2], *more)
        theirs = [THEIRS[f"blocks.0.{module}.{part}.weight"] for part in parts]
        ours = f"blocks.0.{module}.{''.join(parts)}"
        codes = torch.cat([tensors[f"{name}.weight"] for name in theirs])
        assert torch.equal(found[f"{ours}.weight"], codes.view(torch.uint8))
        rows = [tensors[f"{name}.weight_scale"].expand(len(tensors[f"{name}.weight"]), 1) for name in theirs]
        torch.testing.assert_close(found[f"{ours}.weight_scale"], torch.cat(rows).ravel(), rtol=1e-6, atol=0)


def test_its_input_scales_are_ours(calibrated, tmp_path):
    folder, tensors = calibrated
    found = weights_of(exported(folder, tmp_path / "onnx"))
    for linear in (*ALONE, "self_attn.q", "cross_attn.k"):
        theirs = THEIRS[f"blocks.0.{linear}.weight"]
        assert torch.equal(found[f"blocks.0.{linear}.input_scale"], tensors[f"{theirs}.input_scale"])


def test_blocks_that_the_publisher_left_in_16_bits_stay_so(calibrated, tmp_path):
    found = weights_of(exported(calibrated[0], tmp_path / "onnx"))
    assert not any(name.endswith("_scale") for name in found if name.startswith("blocks.1."))


def test_a_lora_makes_new_codes_of_what_it_changes(calibrated, tmp_path):
    folder, tensors = calibrated
    key = "blocks.0.ffn.0"
    pair = {f"{key}.lora_A.weight": torch.ones(1, 256), f"{key}.lora_B.weight": torch.ones(512, 1)}
    safetensors.torch.save_file(pair, tmp_path / "x.safetensors")
    bundle = exported(folder, tmp_path / "onnx", loras=(LoraChoice(tmp_path / "x.safetensors"),))
    found = weights_of(bundle)
    codes = tensors[f"{THEIRS[f'{key}.weight']}.weight"]
    assert not torch.equal(found[f"{key}.weight"], codes.view(torch.uint8))
    merged = codes.float() * tensors[f"{THEIRS[f'{key}.weight']}.weight_scale"] + 1
    step = found[f"{key}.weight_scale"][:, None]
    values = torch.from_numpy(found[f"{key}.weight"].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)) * step
    torch.testing.assert_close(values, merged, rtol=2**-4, atol=float(step.max()) * 2**-9)
    other = THEIRS["blocks.0.ffn.2.weight"]
    assert torch.equal(found["blocks.0.ffn.2.weight"], tensors[f"{other}.weight"].view(torch.uint8))


def test_codes_that_are_no_numbers_are_refused(calibrated, tmp_path):
    folder, tensors = calibrated
    target = shutil.copytree(folder, tmp_path / "spoiled")
    key = f"{THEIRS['blocks.0.self_attn.k.weight']}.weight"
    codes = tensors[key].view(torch.uint8).clone()
    codes[7, 9] = 0xFF
    path = target / "transformer/diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(tensors | {key: codes.view(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match=r"blocks\.0\.self_attn\.qkv\.weight holds NaN"):
        exported(target, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_an_input_scale_that_makes_no_sense_is_named(calibrated, tmp_path):
    folder, tensors = calibrated
    target = shutil.copytree(folder, tmp_path / "spoiled")
    key = f"{THEIRS['blocks.0.ffn.0.weight']}.input_scale"
    path = target / "transformer/diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(tensors | {key: torch.tensor(0.0)}, path)
    with pytest.raises(UserError, match="input_scale holds the scale 0"):
        open_checkpoint(target)
