"""``wan-trt export`` makes what ``wan-trt build`` of the same target takes, of a checkpoint or of single files."""

import re

import pytest
from typer.testing import CliRunner

from engines.targets import check_bundle, target_named
from export.files.safetensors_file import read_safetensors
from tests.wan_trt.test_cli import refused, status
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Number, Precision
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
    assert "use --precision int8" in refused(capsys, "export", tiny_checkpoint, tmp_path / "onnx", *words)
    assert not list(tmp_path.iterdir())


# INT8, and linears of another type


def test_int8_needs_nothing_else_and_linears_can_be_kept_out_of_it(tmp_path, tiny_checkpoint):
    kept = "ffn.2=fp8,self_attn.o,auto"
    precisions, manifest = exported(
        tiny_checkpoint, tmp_path / "onnx", "--precision", "int8", "--keep-high-precision", kept
    )
    assert (manifest.precision, precisions["low_noise"], precisions["text_encoder"]) == ("int8", "int8", "bf16")
    (expert,) = [component for component in manifest.components if component.name == "low_noise"]
    assert expert.exceptions == {"ffn.2": Number.FP8, "self_attn.o": Number.BF16}
    assert expert.stages  # all blocks compute alike
    assert "self_attn.o in bf16" in expert.why_higher
    stored = read_safetensors(tmp_path / "onnx/low_noise.safetensors")
    dtypes = {name: str(stored[f"blocks.1.{name}.weight"].dtype) for name in ("self_attn.qkv", "ffn.2", "self_attn.o")}
    assert dtypes == {"self_attn.qkv": "int8", "ffn.2": "float8_e4m3fn", "self_attn.o": "bfloat16"}
    assert stored["blocks.1.ffn.0.input_factor"].read().min() > 0
    assert "blocks.1.ffn.2.input_factor" not in stored
    check_bundle(target_named("rtx4090"), manifest)
    with pytest.raises(
        UserError, match=r"high_noise with ffn.2 in fp8 for rtx3090 .* --keep-high-precision ffn.2=bf16"
    ):
        check_bundle(target_named("rtx3090"), manifest)


def test_a_branch_is_beside_what_is_in_nvfp4_and_recorded(tmp_path, tiny_checkpoint, capsys):
    words = ["--precision", "fp8", "--high-noise", "nvfp4-ffn", "--low-rank", "48"]
    _, manifest = exported(tiny_checkpoint, tmp_path / "onnx", *words)
    assert {c.name: c.low_rank for c in manifest.components if c.low_rank} == {"high_noise": 48}
    stored = read_safetensors(tmp_path / "onnx/high_noise.safetensors")
    branches = {name.rpartition(".")[0].split(".", 2)[2] for name in stored if ".low_rank_" in name}
    assert branches == {"ffn.0", "ffn.2"}
    assert not [name for name in read_safetensors(tmp_path / "onnx/low_noise.safetensors") if ".low_rank_" in name]
    assert status(["inspect", str(tmp_path / "onnx")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "ONNX graphs of t2v-a14b-tiny, nvfp4-ffn with rank 48 and fp8" in shown
    assert "branches of rank 48 in 16 bits, beside NVFP4" in shown
    assert re.search(r"is vae_decoder_first .* shared with vae_decoder_next", shown)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "int8", "--keep-high-precision", "ffn.9"], "expected one of self_attn.q, "),
        (["--precision", "int8", "--keep-high-precision", "7.ffn.2"], "--keep-high-precision blocks.7.ffn.2"),
        (["--precision", "int8", "--keep-high-precision", "ffn.2=fp9"], "bf16, fp8 or int8 after ="),
        (["--precision", "int8", "--keep-high-precision", "ffn.2=fp32"], "bf16, fp8 or int8"),
        (["--precision", "int8", "--keep-high-precision", "x"], "write them as 0-2,39, ffn.2=fp8 or auto"),
        (["--precision", "bf16", "--keep-high-precision", "auto"], "without 8 or 4 bits"),
        (["--precision", "int8", "--keep-high-precision", ""], "write them as 0-2,39, ffn.2=fp8 or auto"),
        (["--precision", "int8", "--keep-high-precision", "ffn.2="], "bf16, fp8 or int8 after ="),
        (["--precision", "int8", "--input-scales", "s.json"], "--input-scales without FP8"),
        (["--precision", "int8-attn"], "a matrix of tokens by tokens"),
        (["--high-noise", "int8-attn"], "a matrix of tokens by tokens"),
        (["--precision", "int9"], "precision 'int9' | expected one of fp32, "),
        (["--precision", "int8", "--low-rank", "32"], "--low-rank 32 without NVFP4 | expected a transformer in nvfp4"),
        (
            ["--precision", "nvfp4", "--low-rank", "24"],
            "--low-rank 24 | expected a multiple of 16 from 16 to 128 | use",
        ),
        (["--precision", "nvfp4", "--low-rank", "144"], "--low-rank 144 | expected a multiple of 16 from 16 to 128"),
        (["--precision", "nvfp4", "--low-rank", "-16"], "--low-rank -16 | expected a multiple of 16 from 16 to 128"),
        (["--precision", "int8", "--text-encoder", "int8"], "text_encoder in int8"),
        (["--target", "a100", "--precision", "int8+fp8-attn"], "no FP8 units"),
        (["--target", "rtx4090", "--precision", "nvfp4"], "no NVFP4 units"),
        (["--target", "rtx4090", "--high-noise", "nvfp4", "--low-noise", "fp8"], "no NVFP4 units"),
        (["--precision", "int8", "--keep-high-precision", "ffn.2=nvfp4"], "use --precision nvfp4"),
        (
            ["--target", "a100", "--precision", "int8", "--keep-high-precision", "ffn.2=fp8"],
            "--keep-high-precision ffn.2=fp8 for a100",
        ),
    ],
)
def test_what_int8_cannot_be_is_said(tmp_path, tiny_checkpoint, words, said, capsys):
    assert said in refused(capsys, "export", tiny_checkpoint, tmp_path / "onnx", *words)
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
