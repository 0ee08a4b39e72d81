"""A bench of a step cache: times in turns, overhead and memory, apart from all other figures."""

import json

import pytest

from runtime.request import Request
from validate.bench.measure import bench
from validate.bench.report import BenchReport, compare
from validate.bench.step_cache import MEASURED, CacheTimes
from validate.bench.view import _cache, as_text
from validate.bench.work import OURS, BenchOptions
from wan22.caching import Caching
from wan22.errors import UserError

EASY = Caching(easy=True, threshold=9, first_exact=3, last_exact=2, max_consecutive=4)


def options(caching, steps=12):
    request = Request(size=(32, 32), frames=5, steps=steps, cache=caching)
    return BenchOptions(request, only=("low_noise",), runs=1, memory=False, whole_runs=1)


@pytest.fixture(scope="module")
def report(tiny_engines) -> BenchReport:
    return bench(tiny_engines, options=options(EASY))


def test_the_cache_is_measured_beside_exact_runs(report):
    cache, measured = report.result.cache, report.result.measurements()
    assert {f"step_cache.{name}" for name in MEASURED} <= set(measured)
    assert len(cache.caching.skip_steps) == measured["step_cache.skipped_steps"] > 0
    assert cache.by_expert == {"high_noise": (4, 8), "low_noise": (0, 4)}
    assert measured["step_cache.held_latents"] == 3
    assert cache.overhead_ms > 0
    assert len(report.result.runs[OURS].steps) == 12
    assert all(step.engine_seconds > 0 for step in report.result.runs[OURS].steps)
    assert report.as_json()["step_cache"]["by_expert"]["high_noise"] == {"skipped": 4, "steps": 8}


def test_it_is_printed_in_a_table(report, capsys):
    from rich.console import Console

    Console(width=100).print(*as_text(report))
    printed = capsys.readouterr().out
    assert "Denoising with the step cache" in printed
    assert "computed steps, high_noise" in printed
    assert "keeps 3 latents" in printed


def test_what_is_saved_is_the_share_of_the_skipped_time():
    times = CacheTimes(EASY, 40.0, 27.0, 1000.0, 2.0, 3.0, {"dit": (13, 40)}).measurements()
    assert times == {
        "step_cache.speedup": pytest.approx(40 / 27),
        "step_cache.saved_percent": pytest.approx(32.5),
        "step_cache.skipped_steps": 13,
        "step_cache.overhead_ms": 2,
        "step_cache.overhead_percent": pytest.approx(0.2),
        "step_cache.held_latents": 3,
    }


def test_only_the_same_cache_is_compared_with_an_earlier_bench(report, tmp_path):
    baseline = json.loads(json.dumps(report.as_json()))
    same = {change.measurement for change in compare(tmp_path, baseline, report.result).changes}
    assert "step_cache.speedup" in same
    assert "step_cache.saved_percent" not in same
    other = baseline | {"step_cache": baseline["step_cache"] | {"settings": {"easy": False}}}
    found = {change.measurement for change in compare(tmp_path, other, report.result).changes}
    assert found == {name for name in same if not name.startswith("step_cache.")}


def test_four_steps_are_refused(tiny_engines):
    with pytest.raises(UserError, match="a step cache with 4 steps"):
        bench(tiny_engines, options=options(EASY, steps=None))


def test_a_run_that_skipped_nothing_has_no_speed_up():
    table = _cache(CacheTimes(EASY, 40.0, 38.0, 1000.0, 2.0, 3.0, {"dit": (0, 40)}))
    assert next(iter(table.columns[3].cells)) == "skipped nothing"
