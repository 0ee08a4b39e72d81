"""A job through a server, compared with the same job in this process, and its verdict."""

import json

import pytest

from triton_repo.installation import default_environments, find_installation
from validate.bench.samples import Samples
from validate.bench.served_result import BEYOND_STEP, DIRECT, OVERHEAD, SERVED, Cancel, ServedBench
from wan22.errors import UserError
from wan_trt.cli import app

SMALL = ["--triton", "--size", "64x64", "--frames", "5", "--steps", "2", "--runs", "2"]


@pytest.fixture
def server():
    try:
        find_installation(default_environments())
    except UserError as error:
        pytest.skip(f"{error}")


def left(arguments):
    """Exit code of ``wan-trt bench``."""
    with pytest.raises(SystemExit) as code:
        app(["bench", *map(str, arguments)])
    return code.value.code


def test_both_sides_are_timed_and_jobs_are_cancelled(server, tiny_engines, capfd):
    code = left([tiny_engines, *SMALL])
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert code == (0 if result["passed"] else 1)
    assert (result["width"], result["height"], result["frames"], result["steps"]) == (64, 64, 5, 2)
    assert len(result["in_process"]["samples_ms"]) == len(result["served"]["samples_ms"]) == 2
    assert 0 < result["served_inside_model_median_ms"] <= result["served"]["median_ms"]
    assert len(result["cancels"]) == 10
    assert set(result["measured"]) == {OVERHEAD, BEYOND_STEP}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["checkpoint"], "engines alone"), (["--sweep", "steps", "--values", "2,4"], "engines alone")],
)
def test_options_that_a_server_bench_does_not_use_are_refused(tiny_engines, capsys, options, message):
    assert left([tiny_engines, *options, *SMALL]) == 2
    assert message in capsys.readouterr().err


def test_a_gate_on_something_else_is_refused_before_any_work(server, tiny_engines, tmp_path, capsys):
    gate = tmp_path / "gate.toml"
    gate.write_text("[bench]\nhigh_noise.speedup.min = 1.3\n")
    assert left([tiny_engines, *SMALL, "--gate", gate]) == 2
    assert "triton.overhead_percent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("served", "latency", "passed"),
    [((1.05, 1.09, 2.0), 0.25, True), ((1.05, 1.2, 1.3), 0.25, False), ((1.0, 1.0, 1.0), 0.35, False)],
    ids=["within both targets", "too slow a server", "too slow a cancellation"],
)
def test_the_median_of_the_runs_and_the_slowest_cancellation_count(served, latency, passed):
    samples = {DIRECT: Samples((1.0, 1.0, 1.0)), SERVED: Samples(served)}
    cancels = (Cancel(0.05, 0.2), Cancel(latency, 0.2))
    assert bool(ServedBench({}, samples, served, cancels, True)) is passed
