"""``wan-trt export`` makes what ``wan-trt build`` of the same target takes."""

import pytest

from tests.wan_trt.test_cli import refused, status
from wan22.bundle import open_bundle
from wan22.specs import Precision


def exported(checkpoint, folder, *options):
    assert status(["export", str(checkpoint), str(folder), *options]) == 0
    manifest = open_bundle(folder, "graphs").manifest
    return {component.name: component.precision for component in manifest.components}, manifest


def test_the_defaults_of_export_and_build_fit_together(tmp_path, tiny_checkpoint, capsys):
    _, manifest = exported(tiny_checkpoint, tmp_path / "onnx")
    assert manifest.precision == Precision.FP32
    assert "fp32, for target cpu; for a GPU add --target or --precision" in capsys.readouterr().out
    assert status(["build", str(tmp_path / "onnx"), str(tmp_path / "engines")]) == 0


@pytest.mark.parametrize("target", ["rtx4090", "sm120", "h100"])
def test_a_gpu_gets_16_bits_unless_asked_otherwise(tmp_path, tiny_checkpoint, target):
    _, manifest = exported(tiny_checkpoint, tmp_path / "onnx", "--target", target)
    assert manifest.precision == Precision.BF16


def test_fp32_for_tensorrt_rtx_has_a_text_encoder_that_it_can_run(tmp_path, tiny_checkpoint):
    precisions, manifest = exported(tiny_checkpoint, tmp_path / "onnx", "--target", "rtx4090", "--precision", "fp32")
    assert (manifest.precision, precisions["text_encoder"]) == (Precision.FP32, Precision.BF16)
    assert precisions["high_noise"] == Precision.FP32


def test_a_precision_that_the_target_lacks_is_refused_before_any_work(tmp_path, tiny_checkpoint, capsys):
    words = ["--target", "rtx3090", "--precision", "fp8"]
    assert "use --precision bf16" in refused(capsys, "export", tiny_checkpoint, tmp_path / "onnx", *words)
    assert not list(tmp_path.iterdir())
