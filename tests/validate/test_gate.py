"""Gate files: invalid ones are refused, and a gate without a measurement does not pass."""

import math

import pytest

from validate.gate import Gate, judge, read_gates
from wan22.errors import UserError

KNOWN = ("high_noise.speedup", "high_noise.median_ms", "end_to_end.total_s")


def gates_of(tmp_path, text, table="bench"):
    path = tmp_path / "gate.toml"
    path.write_text(text)
    return read_gates(path, table, KNOWN)


def test_every_way_to_write_a_gate_is_the_same(tmp_path):
    expected = (Gate("high_noise.speedup", "min", 1.3), Gate("high_noise.median_ms", "max", 900))
    dotted = "[bench]\nhigh_noise.speedup.min = 1.3\nhigh_noise.median_ms.max = 900"
    tables = "[bench.high_noise]\nspeedup = {min = 1.3}\nmedian_ms.max = 900"
    assert gates_of(tmp_path, dotted) == gates_of(tmp_path, tables) == expected


def test_a_command_reads_its_own_table_only(tmp_path):
    text = "[validate]\nlatents.relative_l2.max = 1e-3\n[bench]\nend_to_end.total_s.max = 60"
    assert gates_of(tmp_path, text) == (Gate("end_to_end.total_s", "max", 60),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bench]\nhigh_noise.speedpu.min = 1", "unknown key bench.high_noise.speedpu .* bench.high_noise.speedup"),
        ("[bnech]\nhigh_noise.speedup.min = 1", "unknown key bnech .* bench"),
        ("[bench]\nhigh_noise.speedup.least = 1", "high_noise.speedup.least = 1 .* min or max"),
        ("[bench]\nhigh_noise.speedup = 1", "high_noise.speedup = 1 .* min or max"),
        ("[bench]\nhigh_noise.speedup.min = 'fast'", "min = 'fast' .* finite number"),
        ("[bench]\nhigh_noise.speedup.min = nan", "min = nan .* finite number"),
        ("[bench]\nhigh_noise.speedup.min = true", "min = True .* finite number"),
        (f"[bench]\nhigh_noise.speedup.min = {'9' * 400}", "min = 9{60} .* finite number"),
        (f"[bench]\nhigh_noise.speedup.min = -{'9' * 400}", "min = -9{59} .* finite number"),
        (f"[bench]\nhigh_noise.speedup.min = {'9' * 5000}", "expected valid TOML"),
        (f"[bench]\nhigh_noise.speedup.min = 0x{'f' * 5000}", "thousands of digits .* finite number"),
        (f"[bench]\nhigh_noise.speedup = 0x{'f' * 5000}", "thousands of digits .* min or max"),
        ("[bench]\n" + ".".join(["a"] * 2000) + " = 1", "bench.a.a.* the name of a measurement"),
        ("[bench]\nmin = 1", "unknown key bench"),
        ("bench = 3", "bench = 3"),
        ("[bench", "expected valid TOML"),
        ("x = " + "[" * 50_000, "expected valid TOML"),
        ("[validate]\nx.max = 1", "no gate in .bench."),
    ],
)
def test_an_invalid_gate_file_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        gates_of(tmp_path, text)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_gates(tmp_path / "none.toml", "bench", KNOWN)


@pytest.mark.parametrize(
    ("gate", "found", "passed"),
    [
        (Gate("x", "min", 1.3), {"x": 1.3}, True),
        (Gate("x", "min", 1.3), {"x": 1.29}, False),
        (Gate("x", "max", 0.5), {"x": 0.5}, True),
        (Gate("x", "max", 0.5), {"x": 0.51}, False),
        (Gate("x", "max", 0.5), {"x": math.nan}, False),
        (Gate("x", "max", 0.5), {"y": 0.1}, False),
    ],
)
def test_verdicts(gate, found, passed):
    (verdict,) = judge([gate], found)
    assert bool(verdict) is passed


def test_a_verdict_in_words():
    missing, there = judge([Gate("a", "min", 1), Gate("b", "max", 2.5)], {"b": 2.0})
    assert str(missing) == "a not measured, ≥ 1"
    assert str(there) == "b 2, ≤ 2.5"


@pytest.mark.parametrize(
    ("found", "gate", "message"),
    [
        (59.99996, Gate("x", "min", 60), "x 59.99996, ≥ 60"),
        (0.020000001, Gate("x", "max", 0.02), "x 0.020000001, ≤ 0.02"),
        (60.0, Gate("x", "min", 60), "x 60, ≥ 60"),
        (59.2, Gate("x", "min", 60), "x 59.2, ≥ 60"),
    ],
)
def test_a_value_that_misses_a_limit_does_not_look_like_the_limit(found, gate, message):
    (verdict,) = judge([gate], {"x": found})
    assert str(verdict) == message
