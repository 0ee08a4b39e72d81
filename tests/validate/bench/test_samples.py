"""Timings in turns, and statistics on them."""

import pytest

from validate.bench.samples import Ratio, Samples, in_turns


def test_sides_take_turns():
    order = []
    found = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert {side: len(samples.seconds) for side, samples in found.items()} == {"a": 3, "b": 3}
    assert found["a"].energy_j is None


def test_energy_is_the_difference_of_a_counter():
    counter = iter([100.0, 103.0, 200.0, 205.0])
    found = in_turns({"a": lambda: None}, 2, lambda: next(counter))
    assert found["a"].joules == (3.0, 5.0)
    assert found["a"].as_json()["energy_j"] == 4.0


def test_a_ratio_is_of_neighbours_not_of_medians():
    slow_then_fast = ((10.0, 1.0, 1.0), (5.0, 0.5, 0.1))
    ratio = Ratio.of(*slow_then_fast)
    assert ratio.median == 2.0
    assert ratio.p10 == 2.0
    assert ratio.p90 == pytest.approx(8.4)


def test_median_and_p90():
    samples = Samples((0.001, 0.002, 0.003, 0.004, 0.105))
    assert samples.as_json() == {
        "median_ms": 3.0,
        "p90_ms": pytest.approx(64.6),
        "samples_ms": [1.0, 2.0, 3.0, 4.0, 105.0],
    }
