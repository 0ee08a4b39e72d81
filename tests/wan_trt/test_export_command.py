"""``wan-trt export`` makes what ``wan-trt build`` of the same target takes, of a checkpoint or of single files."""

import pytest
from typer.testing import CliRunner

from tests.wan_trt.test_cli import refused, status
from wan22.bundle import open_bundle
from wan22.specs import Precision
from wan_trt.cli import app


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


# Files and precisions for single parts


def run(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_a_file_and_a_precision_for_one_part(tmp_path, tiny_checkpoint):
    vae = tmp_path / "other_vae.pth"
    vae.write_bytes((tiny_checkpoint / "Wan2.1_VAE.pth").read_bytes())
    text = tiny_checkpoint / "models_t5_umt5-xxl-enc-bf16.pth"
    options = ["--vae", vae, "--text-encoder", text, "--text-encoder", "bf16", "--precision", "fp32"]
    done = run(tiny_checkpoint, tmp_path / "onnx", *options)
    assert done.exit_code == 0, done.output
    manifest = open_bundle(tmp_path / "onnx", "graphs").manifest
    assert manifest.source.checkpoint == f"{tiny_checkpoint},text_encoder={text},vae={vae}"
    assert {c.name: c.precision for c in manifest.components}["text_encoder"] == Precision.BF16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["CHECKPOINT", "OUT", "--high-noise", "fp8", "--high-noise", "bf16"], "--high-noise bf16 after fp8"),
        (["CHECKPOINT", "OUT", "--high-noise", "fp9"], "--high-noise fp9 | expected a file, or one of fp32"),
        (["CHECKPOINT", "OUT", "--high-noise", "none.gguf"], "none.gguf does not exist"),
        (["CHECKPOINT", "OUT", "--revision", "main"], "--revision main | expected a hub name"),
        (["CHECKPOINT"], "one argument | expected a checkpoint and a folder to write"),
        (["OUT", "--vae", "CHECKPOINT/Wan2.1_VAE.pth"], "no file for high noise, low noise, text encoder"),
        (["CHECKPOINT", "OUT", "--dit", "CHECKPOINT/Wan2.1_VAE.pth"], "one transformer and two experts"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path, tiny_checkpoint, words, said, capsys):
    places = {"CHECKPOINT": str(tiny_checkpoint), "OUT": str(tmp_path / "onnx")}
    with pytest.raises(SystemExit) as left:
        app(["export", *filled(words, places)])
    assert left.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "onnx").exists()


def filled(words, places):
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    return words
