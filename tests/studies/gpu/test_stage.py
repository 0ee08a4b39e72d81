"""Whatever happens in a stage becomes an answer, and what it had found before is kept."""

import pytest

from studies.gpu.stage import Measurement, Stage, StageResult, StageSettings, run_stage

TOLD = Measurement("told", 1.0, "ms")


def answer_of(monkeypatch, tmp_path, body, limit_s=60.0):
    """Of a stage in a module of its own, which its process imports as any other."""
    (tmp_path / "validate_gpu_probe.py").write_text(
        "import os, time\nfrom studies.gpu.stage import Measurement\n"
        f"def work(setting):\n    yield Measurement('told', 1.0, 'ms')\n    {body}\n"
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
def test_every_end_of_a_stage_is_told(monkeypatch, tmp_path, body, status, reason):
    answer = answer_of(monkeypatch, tmp_path, body)
    assert (answer.status, answer.reason, answer.measurements) == (status, reason, [TOLD])


def test_a_stage_whose_time_runs_out_is_ended_and_keeps_what_it_told(monkeypatch, tmp_path):
    answer = answer_of(monkeypatch, tmp_path, "time.sleep(600)", limit_s=6.0)
    assert (answer.status, answer.measurements) == ("time ran out", [TOLD])
    assert answer.seconds < 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_told_in_words(value):
    found = Measurement.of("relative L2", value, "", "to PyTorch")
    assert (found.value, found.note) == (None, f"no number: {value}, to PyTorch")
    assert Measurement.of("relative L2", 0.5) == Measurement("relative L2", 0.5)
