"""Every outcome of a stage becomes a result that keeps the measurements before it."""

import pytest

from studies.gpu.stage import Measurement, Stage, StageResult, StageSettings, run_stage

FOUND = Measurement("found", 1.0, "ms")


def answer_of(monkeypatch, tmp_path, body, limit_s=60.0):
    """Run a stage from a new module, which its process imports like any other."""
    (tmp_path / "validate_gpu_probe.py").write_text(
        "import os, time\nfrom studies.gpu.stage import Measurement\n"
        f"def work(setting):\n    yield Measurement('found', 1.0, 'ms')\n    {body}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    answer = StageResult(Stage("probe", "a probe", "validate_gpu_probe", "work"))
    run_stage(answer, StageSettings(dry_run=True), limit_s)
    return answer


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("return", "measured", ""),
        ("import no_such_package", "failed", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("os._exit(11)", "failed", "its process ended with code 11"),
    ],
)
def test_every_end_of_a_stage_is_reported(monkeypatch, tmp_path, body, status, reason):
    answer = answer_of(monkeypatch, tmp_path, body)
    assert (answer.status, answer.reason, answer.measurements) == (status, reason, [FOUND])


def test_a_stage_whose_time_runs_out_is_killed_and_keeps_its_measurements(monkeypatch, tmp_path):
    answer = answer_of(monkeypatch, tmp_path, "time.sleep(600)", limit_s=6.0)
    assert (answer.status, answer.measurements) == ("time ran out", [FOUND])
    assert answer.seconds < 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_reported_in_words(value):
    found = Measurement.of("relative L2", value, "", "to PyTorch")
    assert (found.value, found.note) == (None, f"not finite: {value}, to PyTorch")
    assert Measurement.of("relative L2", 0.5) == Measurement("relative L2", 0.5)
