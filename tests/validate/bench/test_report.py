"""Regressions, and the measurements that are comparable across machines."""

from pathlib import Path

import pytest

from validate.bench.report import Change, check_comparable, compare
from wan22.errors import UserError

IDLE = {"load_average": [0.1, 2.0]}
HERE = {"cpu": "A", "cores": 2, "gpu": ""}
BEFORE = {
    "high_noise.median_ms": 100.0, "high_noise.p90_ms": 102.0, "high_noise.roofline_percent": 50.0,
    "high_noise.speedup": 2.0, "high_noise.speedup_p10": 1.9, "high_noise.memory_ratio": 0.5,
    "high_noise.relative_l2": 1e-6, "end_to_end.total_s": 10.0, "end_to_end.total_p90_s": 13.0,
    "end_to_end.decode_s": 4.0, "end_to_end.step_speedup": 2.0, "end_to_end.step_speedup_p10": 1.9,
}  # fmt: skip


class Result:
    """The part of a result that a comparison reads."""

    def __init__(self, machine=HERE, **changed):
        self.machine, self._changed = machine, {name.replace("__", "."): value for name, value in changed.items()}

    def measurements(self):
        return BEFORE | self._changed

    def as_json(self):
        return {"measurements": self.measurements(), "machine": self.machine, "conditions": IDLE}


def compared(result, machine=HERE, conditions=IDLE):
    baseline = {"machine": machine, "measurements": BEFORE, "conditions": conditions}
    return compare(Path("old.json"), baseline, result)


def regressions(result, machine=HERE):
    return {change.measurement for change in compared(result, machine).regressions}


def test_nothing_changed():
    assert regressions(Result()) == set()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"high_noise__median_ms": 110.0, "high_noise__p90_ms": 111.0}, {"high_noise.median_ms"}),
        ({"high_noise__median_ms": 104.0}, set()),  # within the tolerance
        ({"high_noise__median_ms": 110.0, "high_noise__p90_ms": 130.0}, set()),  # within the new run's spread
        ({"high_noise__roofline_percent": 40.0}, {"high_noise.roofline_percent"}),  # higher is better
        ({"high_noise__roofline_percent": 60.0}, set()),
        ({"high_noise__speedup": 1.8, "high_noise__speedup_p10": 1.75}, {"high_noise.speedup"}),
        ({"high_noise__memory_ratio": 0.6}, {"high_noise.memory_ratio"}),
        ({"high_noise__relative_l2": 1e-3}, set()),  # another command judges parity
        ({"end_to_end__decode_s": 5.0}, set()),  # whole runs spread by 30 %
        ({"end_to_end__decode_s": 6.0}, {"end_to_end.decode_s"}),
        ({"end_to_end__step_speedup": 1.5, "end_to_end__step_speedup_p10": 1.4}, {"end_to_end.step_speedup"}),
        ({"end_to_end__step_speedup": 1.5, "end_to_end__step_speedup_p10": 1.0}, set()),
    ],
)
def test_what_is_a_regression(changed, expected):
    assert regressions(Result(**changed)) == expected


def test_only_ratios_are_compared_with_another_machine():
    found = compared(Result(high_noise__median_ms=500.0, high_noise__memory_ratio=0.6), HERE | {"cpu": "B"})
    assert not found.same_machine
    assert found.difference == "cpu 'B', here 'A'"
    assert {change.measurement for change in found.changes} == {
        "high_noise.speedup", "high_noise.memory_ratio", "end_to_end.step_speedup",
    }  # fmt: skip
    assert [change.measurement for change in found.regressions] == ["high_noise.memory_ratio"]


@pytest.mark.parametrize("lacking", ["high_noise.p90_ms", "end_to_end.total_p90_s", "end_to_end.total_s"])
def test_a_baseline_may_lack_the_values_of_the_spread(lacking):
    baseline = {"machine": HERE, "conditions": IDLE}
    for measurements in ({k: v for k, v in BEFORE.items() if k != lacking}, BEFORE | {lacking: 0}):
        found = compare(Path("old.json"), baseline | {"measurements": measurements}, Result())
        assert not found.regressions


def test_a_busy_machine_is_noted():
    assert not compared(Result()).busy
    assert compared(Result(), conditions={"load_average": [1.5, 2.0]}).busy


def test_how_much_worse():
    assert Change("x.median_ms", 100, 110, 0).worse == pytest.approx(0.1)
    assert Change("x.speedup", 2.0, 1.0, 0).worse == pytest.approx(1.0)
    assert Change("end_to_end.image_s", 0.0, 0.0, 0).worse == 0


def test_a_baseline_of_something_else_names_the_field():
    facts = {"model": "t2v-a14b-tiny", "frames": 5}
    check_comparable(Path("old.json"), facts | {"machine": {}}, facts)
    with pytest.raises(UserError, match=r"old.json: frames 9 \| expected 5 of this run"):
        check_comparable(Path("old.json"), facts | {"frames": 9}, facts)
