"""``wan-trt mlperf``: the official LoadGen drives tiny engines; a run that fails leaves nothing."""

import json
import os
import re
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from runtime.request import Request
from wan22.errors import UserError
from wan22.specs import SPECS
from wan_trt.cli import app
from wan_trt.recipes import mlperf
from wan_trt.recipes.mlperf import MlperfOptions, MlperfResult, run_mlperf

SMALL = Request(size=(64, 48), frames=5, steps=2, seed=42, preset="mlperf")
PROMPTS = ("a red ball", "a blue ball")
LOADGEN = pytest.mark.skipif(find_spec("mlperf_loadgen") is None, reason="needs mlcommons-loadgen")


def test_figures_have_units_that_are_read_at_once():
    summary = {"90.0th percentile latency (ns)": "1984903758"}
    result = MlperfResult(Path(), valid=False, summary=summary, videos=2, lacks=())
    assert result.figure == "90th percentile latency: 1.985 s"
    assert replace(result, summary={"Samples per second": "0.645934"}).figure == "Samples per second: 0.6459"
    assert replace(result, summary={}).figure == ""


@LOADGEN
@pytest.mark.parametrize(("scenario", "figure"), [("SingleStream", "percentile latency"), ("Offline", "Samples per")])
def test_loadgen_measures_as_many_samples_as_asked_and_writes_its_logs(tmp_path, tiny_engines, scenario, figure):
    result = run_mlperf(tiny_engines, tmp_path / "run", PROMPTS, SMALL, MlperfOptions(scenario, 3))
    assert result.videos == 3
    assert figure in result.figure
    assert result.summary["Scenario"] == scenario
    assert result.summary["Min queries satisfied"] == "Yes"
    there = {path.name for path in result.folder.iterdir()}
    assert there >= {"mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json", "mlperf.json"}
    assert there & {"0000.mp4", "0001.mp4"}
    facts = json.loads((result.folder / "mlperf.json").read_text())
    assert (facts["scenario"], facts["samples"], facts["caches"]) == (scenario, 3, "none")
    assert "its 248 prompts, not 2" in facts["lacks"]


@LOADGEN
def test_an_accuracy_run_makes_every_prompt_once(tmp_path, tiny_engines):
    options = MlperfOptions("Offline", 1, accuracy=True)
    result = run_mlperf(tiny_engines, tmp_path / "run", PROMPTS, SMALL, options)
    assert sorted(path.name for path in result.folder.glob("*.mp4")) == ["0000.mp4", "0001.mp4"]
    assert len(json.loads((result.folder / "mlperf_log_accuracy.json").read_text())) == 2
    assert "an accuracy run, judged by VBench" not in result.lacks


@LOADGEN
def test_a_sample_that_fails_ends_the_run_and_leaves_nothing(tmp_path, tiny_engines):
    beyond_utf8 = [PROMPTS[0], "\ud800"]
    with pytest.raises(UserError, match="text that UTF-8 can hold"):
        run_mlperf(tiny_engines, tmp_path / "run", beyond_utf8, SMALL, MlperfOptions("Offline", 20, min_duration_s=600))
    assert not list(tmp_path.iterdir())


@LOADGEN
def test_ctrl_c_ends_a_run_at_once_and_leaves_nothing(tmp_path, tiny_engines):
    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_mlperf(tiny_engines, tmp_path / "run", PROMPTS, SMALL, MlperfOptions(samples=9, min_duration_s=600), press)
    assert not list(tmp_path.iterdir())


@LOADGEN
def test_an_earlier_run_is_replaced_only_when_asked(tmp_path, tiny_engines):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for options, words in ((MlperfOptions(), "exists"), (MlperfOptions(overwrite=True), "has no mlperf.json")):
        with pytest.raises(UserError, match=words):
            run_mlperf(tiny_engines, tmp_path / "other", PROMPTS, SMALL, options)
    assert (tmp_path / "other" / "file").read_text() == "mine"


@LOADGEN
def test_the_command_prints_the_figure_and_what_the_run_lacks(tmp_path, tiny_engines):
    words = ["mlperf", str(tiny_engines), "-o", str(tmp_path / "run"), "--scenario", "Offline", "--samples", "2"]
    told = CliRunner().invoke(app, [*words, "--size", "64x48", "--frames", "5", "--steps", "2"])
    assert told.exit_code == 0, told.output
    assert "Samples per second" in told.output
    assert "no submission; it lacks the model t2v-a14b" in told.output.replace("\n", " ")
    again = CliRunner().invoke(app, [*words, "--size", "64x48", "--frames", "5"])
    assert again.exit_code == 2


def test_without_loadgen_one_line_says_what_to_install(tmp_path, tiny_engines, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(UserError, match=r"cannot import mlperf_loadgen .*pip install mlcommons-loadgen"):
        run_mlperf(tiny_engines, tmp_path / "run", PROMPTS, SMALL, MlperfOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MlperfOptions(samples=0), "0 samples"),
        (MlperfOptions(samples=1_000_001), "1000001 samples | expected 1 to 1000000"),
        (MlperfOptions(samples=10**20), "samples"),
        (MlperfOptions(min_duration_s=float("inf")), "a duration of inf s | expected 0 to 86400 s"),
        (MlperfOptions(min_duration_s=float("nan")), "a duration of nan s"),
        (MlperfOptions(min_duration_s=1e300), "a duration of 1e+300 s"),
        (MlperfOptions(audit=mlperf.Path("/no/audit.config")), "no such file"),
    ],
)
def test_options_that_loadgen_does_not_take_are_refused(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        mlperf.check_options(options)


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 99, b"mode = 2\n", b"# *.*.mode = 2\n", b"*.*.mode=2\n"])
def test_an_audit_file_has_a_setting_in_loadgens_form(tmp_path, content):
    audit = tmp_path / "audit.config"
    audit.write_bytes(content)
    with pytest.raises(UserError, match=r"no line such as '\*\.\*\.mode = 2'"):
        mlperf.check_options(MlperfOptions(audit=audit))
    audit.write_bytes(b"# TEST04\n*.*.mode = 2\r\n" + content)
    mlperf.check_options(MlperfOptions(audit=audit))


@pytest.mark.parametrize("option", ["--samples", "--min-duration-s"])
def test_an_accuracy_run_takes_no_samples_and_no_duration(tmp_path, tiny_engines, option):
    words = ["mlperf", str(tiny_engines), "-o", str(tmp_path / "run"), "--accuracy", option, "5"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "--accuracy with --samples or --min-duration-s" in str(refused.exception) + refused.output
    assert not list(tmp_path.iterdir())


@LOADGEN
@pytest.mark.parametrize("options", [MlperfOptions(min_duration_s=86_400), MlperfOptions(samples=1_000_000)])
def test_the_longest_runs_fit_into_memory(tmp_path, tiny_engines, options):
    with pytest.raises(UserError, match="text that UTF-8 can hold"):
        run_mlperf(tiny_engines, tmp_path / "run", ["\ud800"], SMALL, options)


def test_the_setting_of_the_benchmark_lacks_nothing_but_the_accuracy_run():
    bundle = SimpleNamespace(manifest=SimpleNamespace(spec=SPECS["t2v-a14b"]))
    request = Request(size=(1280, 720), frames=81, preset="mlperf", seed=42, noise=object())
    lacks = mlperf._lacks(bundle, request, 248, MlperfOptions(min_duration_s=600))
    assert lacks == ["an accuracy run, judged by VBench"]
    official = mlperf._lacks(bundle, replace(request, preset="official", steps=20), 248, MlperfOptions(accuracy=True))
    assert official == ["the preset mlperf, not official"]
    quick = mlperf._lacks(bundle, replace(request, steps=4), 248, MlperfOptions(accuracy=True))
    assert quick == ["20 steps, not 4"]
