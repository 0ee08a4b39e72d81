"""Engines with merged LoRAs are compared with a reference that has the same LoRAs merged, or not at all."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch

from engines.build import build_engines
from export.checkpoint.checkpoint import open_checkpoint
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from runtime.pipeline import Pipeline
from runtime.request import Request
from validate import ValidateOptions, validate
from validate.reference.loras import with_loras
from validate.reference.parts import load_part
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.progress import silent
from wan22.specs import SPECS

SPEC = SPECS["t2v-a14b-tiny"]
SMALL = ValidateOptions(Request(size=(64, 64), frames=1, steps=2))
MODULE, THEIRS, RANK, ALPHA = "blocks.1.self_attn.q", "blocks.1.attn1.to_q.weight", 4, 1.5


def write_lora(path, seed):
    random = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=random) / 4 for shape in ((RANK, 256), (256, RANK)))
    half = {f"diffusion_model.{MODULE}.lora_down.weight": down, f"diffusion_model.{MODULE}.lora_up.weight": up}
    safetensors.torch.save_file({**half, f"diffusion_model.{MODULE}.alpha": torch.tensor(ALPHA)}, path)
    return down, up


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint):
    """Engines that have "style" merged into both experts and "detail" into the low-noise one."""
    root = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("style", "detail")):
        write_lora(root / f"{name}.safetensors", seed)
    choices = LoraChoice(root / "style.safetensors", 0.7), LoraChoice(root / "detail.safetensors", -1.3, "low")
    export_checkpoint(tiny_checkpoint, root / "onnx", ExportOptions(Precision.FP32, loras=choices))
    build_engines(root / "onnx", root / "engines")
    return root


@pytest.fixture(scope="module")
def manifest(folder):
    with Pipeline.open(folder / "engines") as pipeline:
        return pipeline.bundle.manifest


@pytest.fixture(scope="module")
def report(folder, tiny_checkpoint):
    return validate(folder / "engines", tiny_checkpoint, folder / "report", SMALL)


def test_engines_with_loras_match_pytorch(report):
    assert [row.name for row in report.failed] == []


def test_the_report_names_every_lora(report, folder):
    style, detail = folder / "style.safetensors", folder / "detail.safetensors"
    assert report.facts["LoRAs"] == f"{style} at 0.7 in high_noise, low_noise; {detail} at -1.3 in low_noise"


def test_the_loras_are_seen(folder, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("validate.reference.checkpoint.with_loras", lambda checkpoint, manifest: checkpoint)
    found = validate(folder / "engines", tiny_checkpoint, tmp_path, SMALL)
    assert {row.component for row in found.failed} >= {"high_noise", "low_noise", "video"}


@pytest.mark.parametrize("expert", SPEC.experts)
def test_the_reference_has_the_merge_of_pytorch_bit_for_bit(folder, tiny_checkpoint, manifest, expert):
    checkpoint = open_checkpoint(tiny_checkpoint)
    merged = load_part(with_loras(checkpoint, manifest), expert, silent).state_dict()
    plain = load_part(checkpoint, expert, silent).state_dict()
    expected = plain[THEIRS].clone()
    for seed, name, strength in ((0, "style", 0.7), (1, "detail", -1.3)):
        down, up = write_lora(folder / "again.safetensors", seed)
        if name == "style" or expert == "low_noise":
            expected = expected + strength * (ALPHA / RANK) * (up @ down)
    assert torch.equal(merged.pop(THEIRS), expected)
    assert not torch.equal(plain.pop(THEIRS), expected)
    assert all(torch.equal(merged[name], weight) for name, weight in plain.items())


def test_a_missing_lora_is_named(tiny_checkpoint, manifest, tmp_path):
    gone = replace(manifest, loras=(replace(manifest.loras[0], file=str(tmp_path / "style.safetensors")),))
    with pytest.raises(UserError, match=r"LoRA .*style\.safetensors is missing"):
        with_loras(open_checkpoint(tiny_checkpoint), gone)


def test_a_changed_lora_is_named(tiny_checkpoint, manifest, tmp_path):
    write_lora(tmp_path / "style.safetensors", seed=5)
    changed = replace(manifest, loras=(replace(manifest.loras[0], file=str(tmp_path / "style.safetensors")),))
    with pytest.raises(UserError, match=r"LoRA .*style\.safetensors: sha256"):
        with_loras(open_checkpoint(tiny_checkpoint), changed)
