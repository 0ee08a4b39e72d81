"""Presets and the switch of experts on the command line."""

import re

import pytest
from typer.testing import CliRunner

from wan22.bundle import open_bundle
from wan22.sampling import ALIASES, PRESETS
from wan_trt.cli import app

SMALL = ["--size", "32x32", "--frames", "1", "--steps", "4", "--shift", "5"]  # official timesteps 999 937 833 624


def invoke(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def test_every_preset_is_listed_with_its_source():
    output = invoke("presets").stdout
    assert all(name in output for name in (*PRESETS, *ALIASES))
    assert "1000 954.545 875 700" in output
    assert "lightx2v/Wan2.2-Lightning" in output


def test_an_exported_preset_is_what_the_bundle_samples_with(tiny_checkpoint, tmp_path):
    result = invoke("export", tiny_checkpoint, tmp_path / "onnx", "--precision", "fp32", "--preset", "lightning")
    assert result.exit_code == 0, result.output
    spec = open_bundle(tmp_path / "onnx", "graphs").manifest.spec
    assert spec == spec.with_preset("official").with_preset("lightx2v-4step")
    assert (spec.sampling.preset, spec.sampling.steps) == ("lightx2v-4step", 4)


def test_an_unknown_preset_makes_no_bundle(tiny_checkpoint, tmp_path):
    result = invoke("export", tiny_checkpoint, tmp_path / "onnx", "--preset", "thunder")
    assert result.exit_code == 2
    assert "preset 'thunder' | expected one of official, " in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "high"), [([], 2), (["--boundary", "0.95"], 1), (["--boundary", "0.7"], 3)])
def test_generate_switches_experts_at_the_boundary(tiny_engines, tmp_path, options, high):
    result = invoke("generate", tiny_engines, "a fox", "-o", tmp_path / "fox.png", *SMALL, *options, "-v")
    assert result.exit_code == 0, result.output
    experts = re.findall(r"(high|low)_noise", result.stdout)
    assert experts == ["high"] * high + ["low"] * (4 - high)
