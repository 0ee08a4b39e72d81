"""``wan-trt export`` takes files and precisions for single parts, beside a checkpoint or instead of one."""

import pytest
from typer.testing import CliRunner

from wan22.bundle import open_bundle
from wan22.specs import Precision
from wan_trt.cli import app


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
        (["CHECKPOINT", "OUT", "--high-noise", "fp8", "--high-noise", "bf16"], "--high-noise bf16 beside fp8"),
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
