"""Plans and fusion reports from the command line."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from engines.build import BuildOptions, build_engines
from tests.wan_trt.test_cli import refused, status


def test_a_plan_agrees_with_the_arithmetic_of_the_model(capsys):
    assert status(["plan", "t2v-a14b", "--target", "h100", "--size", "1280x720", "--frames", "81", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 75600
    assert plan["step_pflop"] == pytest.approx(2 * 6.523, rel=1e-3)


def test_a_plan_for_people_says_whether_it_fits(capsys):
    assert status(["plan", "ti2v-5b", "--target", "rtx4090", "--precision", "fp8"]) == 0
    told = capsys.readouterr().out
    assert "4,999,787,712" in told
    assert "fits" in told


def test_the_precisions_of_a_card_are_compared(capsys):
    assert status(["plan", "t2v-a14b", "--target", "rtx3090", "--compare-precisions"]) == 0
    told = capsys.readouterr().out
    assert "recommended: --precision int8" in told
    refused_precisions = [" ".join(part.split()) for part in told.split("not ")]
    no_fp8 = "fp8, fp8-attn, int8+fp8-attn: compute capability 8.6 has no FP8 units"
    assert no_fp8 in refused_precisions
    assert sum("compute capability" in part for part in refused_precisions) == 2  # a line a reason: FP8 and NVFP4
    assert status(["plan", "t2v-a14b", "--target", "rtx4090", "--compare-precisions", "--json"]) == 0
    plans = {plan["precision"]: plan for plan in json.loads(capsys.readouterr().out)}
    steps = {name: plan["roofline_step_s"] for name, plan in plans.items()}
    assert steps["int8+fp8-attn"] < steps["int8"] < steps["bf16"]
    assert steps["int8+fp8-attn"] < steps["fp8-attn"]
    figures = {name: plan["figures"] for name, plan in plans.items()}
    assert figures["fp32"] is None
    for name, found in figures.items():
        assert name == "fp32" or 0 < max(found["velocity"].values()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["t2v-a14b", "--target", "rtx2080"], "target 'rtx2080'"),
        (["wan3", "--target", "cpu"], "model 'wan3'"),
        (["t2v-a14b", "--target", "a100", "--precision", "fp8"], "use --precision int8"),
        (["t2v-a14b", "--target", "h100", "--frames", "80"], "80 frames"),
        (["t2v-a14b", "--compare-precisions"], "--compare-precisions without --target"),
        (["t2v-a14b", "--compare-precisions", "--cards"], "--cards with --compare-precisions"),
        (["t2v-a14b", "--compare-precisions", "--target", "h100", "--gpus", "2"], "with --gpus"),
        (["t2v-a14b", "--compare-precisions", "--target", "h100", "--bus", "2"], "with --bus"),
        (["t2v-a14b", "--cards", "--link", "pcie4"], "--cards with --link"),
        (["t2v-a14b", "--target", "h100", "--goal", "latency"], "one GPU with --goal"),
        (["t2v-a14b", "--target", "h100", "--link", "pcie4", "--efficiency", "0.5"], "--link, --efficiency"),
    ],
)
def test_plans_that_cannot_be(capsys, arguments, told):
    assert told in refused(capsys, "plan", *arguments)


def test_engines_and_graphs_without_compiled_kernels_are_described(capsys, tiny_engines, tiny_bundle):
    assert status(["inspect", str(tiny_engines), "--json"]) == 0
    whole, *components = json.loads(capsys.readouterr().out)
    assert whole["is"].startswith("engines for cpu (onnxruntime ")
    assert [entry["is"] for entry in components[1:3]] == ["high_noise in fp32", "low_noise in fp32"]
    assert "time_features float32 [1, 256]" in components[1]["inputs"]
    assert status(["inspect", str(tiny_bundle)]) == 0
    told = capsys.readouterr().out
    assert "ONNX graphs of t2v-a14b-tiny, fp32" in told
    assert "a GPU" in refused(capsys, "inspect", tiny_bundle, "--target", "cpu")
    assert "name a --target" in refused(capsys, "inspect", tiny_bundle, "--size", "64x64")
    assert "add --target" in refused(capsys, "inspect", tiny_bundle, "--component", "high_noise")


def test_options_and_folders_that_do_not_match_are_named_as_given(capsys, tmp_path, tiny_bundle, tiny_engines):
    told = refused(capsys, "export", tiny_bundle, tmp_path / "b", "--precision", "fp32")
    assert "is a bundle made by wan-trt" in told
    told = refused(capsys, "generate", tiny_engines, "A fox", "-o", tmp_path / "a.mp4", "--vram", "8GiB")
    assert "--vram for whole engines" in told
    assert "--weights-in" not in told
    told = refused(capsys, "generate", tiny_engines, "A", "-o", tmp_path / "a.mp4", "--extend", "localhost:8000/v1")
    assert "begin it with http://" in told


def test_files_of_calibrate_are_described_and_others_without_weights_refused(capsys, tmp_path, tiny_bundle):
    means, scales = tmp_path / "means.safetensors", tmp_path / "scales.json"
    save_file({"high_noise.blocks.0.ffn.0.input_mean": np.zeros(4, np.float32)}, means)
    scales.write_text('{"high_noise": {"blocks.0.ffn.net.0.proj": {"input_scale": 0.5}}}')
    for path, option in ((means, "--input-means"), (scales, "--input-scales")):
        assert status(["inspect", str(path), "--json"]) == 0
        (entry,) = json.loads(capsys.readouterr().out)
        assert (entry["is"].endswith("of 1 linears, by wan-trt calibrate"), entry["export"]) == (
            True,
            f"reads it with {option} {path}",
        )
    (tmp_path / "prompts.txt").write_text("A fox")
    for path in (tmp_path / "prompts.txt", tiny_bundle / "bundle.json", tiny_bundle / "high_noise.onnx"):
        told = refused(capsys, "inspect", path)
        assert "is no file of weights" in told
        assert "download" not in told


def test_a_file_of_weights_of_engines_says_whose_it_is(capsys, tmp_path, tiny_bundle):
    build_engines(tiny_bundle, tmp_path / "e", BuildOptions(topology="blocks"))
    (weights,) = tmp_path.glob("e/high_noise.weights")
    assert status(["inspect", str(weights), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["is"] == "the weights of high_noise of t2v-a14b-tiny in fp32"
    assert entry["holds"].startswith("2 blocks of ")
    shutil.copy(weights, tmp_path / "alone.weights")
    assert "alone.weights is in no bundle | " in refused(capsys, "inspect", tmp_path / "alone.weights")


def test_a_file_that_cannot_be_read_is_refused(capsys, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"xx")
    assert "x.safetensors: no safetensors header | " in refused(capsys, "inspect", tmp_path / "x.safetensors")


@pytest.mark.slow
def test_a_bundle_is_compiled_to_look_at_it(tmp_path, tiny_checkpoint, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert status(["export", str(tiny_checkpoint), str(tmp_path / "onnx"), "--precision", "bf16"]) == 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    arguments = ["inspect", str(tmp_path / "onnx"), "--target", "rtx4090", "--component", "high_noise"]
    assert status([*arguments, "--size", "128x64..256x160", "--frames", "17", "--html", str(page)]) == 0
    assert "kernels" in capsys.readouterr().out
    assert "high_noise" in page.read_text()
    assert status([*arguments, "--size", "256x160", "--frames", "17", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["component"], report["attention"]) == ("high_noise", {"bf16": 4})
