"""A bench of a tiny model: every piece on both sides, end-to-end runs, and values that are not finite."""

import math

import numpy as np
import pytest

from runtime.request import Request
from validate.bench.measure import bench, differences
from validate.bench.result import known_measurements
from validate.bench.work import EAGER, OURS, BenchOptions
from wan22.specs import SPECS

SMALL = {"request": Request(size=(32, 32), frames=5, steps=2), "runs": 2, "whole_runs": 2, "memory": False}


@pytest.fixture(scope="module")
def report(flow_of):
    flow = flow_of("i2v-a14b-tiny")
    return bench(flow.engines, flow.checkpoint, BenchOptions(**SMALL))


def test_every_piece_is_timed_on_both_sides(report):
    pieces = {piece.name: piece for piece in report.result.pieces}
    assert list(pieces) == ["text_encoder", "vae_encoder", "high_noise", "low_noise", "vae_decoder"]
    for piece in pieces.values():
        assert {side: len(samples.seconds) for side, samples in piece.samples.items()} == {OURS: 2, EAGER: 2}
        assert piece.ratio(EAGER).p10 <= piece.ratio(EAGER).median <= piece.ratio(EAGER).p90


def test_both_sides_do_the_same_work(report):
    assert {name: found < 1e-4 for name, found in relative_l2(report).items()} == dict.fromkeys(
        relative_l2(report), True
    )
    assert len(relative_l2(report)) == 5
    assert not report.result.faults


def relative_l2(report):
    return {piece.name: piece.difference[EAGER] for piece in report.result.pieces}


def test_calls_of_the_decoder_are_timed_separately(report):
    graphs = report.result.pieces[-1].graphs
    assert {name: len(samples.seconds) for name, samples in graphs.items()} == {
        "vae_decoder_first": 2,
        "vae_decoder_next": 2,
    }


def test_a_forward_with_a_new_prompt_is_timed_separately(report):
    pieces = {piece.name: piece for piece in report.result.pieces}
    anew = pieces["high_noise"].new_prompt
    assert {side: len(samples.seconds) for side, samples in anew.items()} == {OURS: 2, EAGER: 2}
    assert not pieces["text_encoder"].new_prompt
    measured = report.result.measurements()
    assert measured["high_noise.new_prompt_median_ms"] == 1000 * anew[OURS].median
    assert measured["high_noise.new_prompt_speedup"] == pieces["high_noise"].ratio(EAGER, new_prompt=True).median


def test_whole_runs_have_a_curve_on_both_sides(report):
    for runs in report.result.runs.values():
        assert len(runs.each) == 2
        assert [step.component for step in runs.steps] == ["high_noise", "low_noise"]
        figures = runs.figures()
        assert figures["first_frame_s"] <= figures["total_s"] <= figures["total_p90_s"]
        assert figures["expert_swap_s"] > 0
        assert 0 < figures["vae_share_percent"] < 100


def test_every_measurement_has_a_name_that_gates_know(report):
    measured = report.result.measurements()
    known = known_measurements(SPECS["i2v-a14b-tiny"])
    assert set(measured) < set(known)
    assert all(math.isfinite(value) for value in measured.values())
    for name in ("high_noise.speedup", "vae_encoder.median_ms", "end_to_end.step_speedup", "low_noise.relative_l2"):
        assert name in measured


@pytest.mark.parametrize("model", ["t2v-a14b-tiny", "ti2v-5b-tiny"])
def test_gates_know_no_name_that_this_model_cannot_measure(model):
    known = known_measurements(SPECS[model])
    assert ("vae_encoder.median_ms" in known) is (model == "ti2v-5b-tiny")
    assert not [name for name in known if name.startswith("low_noise") and name.endswith("peak_host_bytes")]


def test_a_5b_model_starts_from_its_image_on_both_sides(flow_of):
    flow = flow_of("ti2v-5b-tiny")
    options = BenchOptions(**SMALL | {"runs": 1, "whole_runs": 1, "only": ("dit", "vae_encoder")})
    result = bench(flow.engines, flow.checkpoint, options).result
    assert [piece.name for piece in result.pieces] == ["vae_encoder", "dit"]
    assert not result.faults
    assert set(result.runs) == {OURS, EAGER}


def test_differences_name_every_side_that_is_not_finite():
    good, bad = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert differences({OURS: good, EAGER: 2 * good}) == ({EAGER: 0.5}, ())
    assert differences({OURS: good, EAGER: bad, "compiled": good}) == ({"compiled": 0.0}, (EAGER,))
    assert differences({OURS: bad, EAGER: good}) == ({}, (OURS,))
    assert differences({OURS: np.full(3, np.inf, np.float32), EAGER: good}) == ({}, (OURS,))
