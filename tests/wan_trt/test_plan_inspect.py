"""Plans and fusion reports from the command line."""

import json

import pytest

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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["t2v-a14b", "--target", "rtx2080"], "target 'rtx2080'"),
        (["wan3", "--target", "cpu"], "model 'wan3'"),
        (["t2v-a14b", "--target", "a100", "--precision", "fp8"], "use --precision bf16"),
        (["t2v-a14b", "--target", "h100", "--frames", "80"], "80 frames"),
    ],
)
def test_plans_that_cannot_be(capsys, arguments, told):
    assert told in refused(capsys, "plan", *arguments)


def test_cpu_engines_have_no_kernels_to_show(capsys, tiny_engines, tiny_bundle):
    assert "engines for ONNX Runtime" in refused(capsys, "inspect", tiny_engines)
    assert "a GPU" in refused(capsys, "inspect", tiny_bundle, "--target", "cpu")
    assert "name a --target" in refused(capsys, "inspect", tiny_bundle, "--size", "64x64")
    assert "add --target" in refused(capsys, "inspect", tiny_bundle)


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
