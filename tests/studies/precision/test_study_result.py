"""A precision that collapses is reported first and, if it can be exported, fails the study."""

import math
import statistics
from dataclasses import replace

import pytest

from studies.precision.attention import attention_errors
from studies.precision.outliers import INPUTS
from studies.precision.result import COLLAPSE, PartError, Study, VariantResult
from studies.precision.variants import VARIANTS

OFFERED = next(variant for variant in VARIANTS if variant.name == "fp8-attn")
ABLATION = next(variant for variant in VARIANTS if variant.ablation)


def study_of(*results):
    parts = (PartError("fp8 in self-attention", 0.01), PartError("fp8 in self-attention, K not smoothed", 0.05))
    return Study({"model": "m"}, (999.0, 500.0), results, parts, (), (), ())


@pytest.mark.parametrize(
    ("errors", "problem", "verdict"),
    [
        ((0.01, 0.02), "", "meets its aim"),
        ((0.01, 0.05), "", "misses its aim"),
        ((0.01, COLLAPSE), "", "collapses"),
        ((math.nan, 0.01), "", "collapses"),
        ((0.01, 0.01), "velocity of dit is NaN", "collapses"),
    ],
)
def test_the_worst_step_decides(errors, problem, verdict):
    result = VariantResult(OFFERED, errors, 40.0, 1.0, problem)
    assert result.verdict == verdict
    study = study_of(VariantResult(OFFERED, (0.01, 0.01), 40.0, 1.0), result)
    assert bool(study) == (verdict != "collapses")
    assert study.tone == ("good" if verdict == "meets its aim" else "bad")
    assert study.sentences[0].startswith(f"fp8-attn {verdict}: ")


def test_an_ablation_that_collapses_is_reported_but_fails_nothing():
    study = study_of(VariantResult(ABLATION, (0.5, math.inf), 3.0, 1.0))
    assert study
    assert study.sentences[0].startswith(f"{ABLATION.name} collapses")


def test_an_ablation_that_does_not_collapse_cannot_be_exported_either():
    assert VariantResult(ABLATION, (0.01, 0.01), 40.0, 1.0).verdict == "cannot be exported"
    assert "fp8 in self-attention, K not smoothed: 5.00% instead of 1.00%" in study_of().sentences


def test_normalising_before_quantising_costs_more_the_longer_the_sequence():
    flat = {error.tokens: error for error in attention_errors(0, (1024, 32768)) if error.spread == 1}
    assert flat[32768].as_written > 1.15 * flat[1024].as_written
    assert flat[32768].as_fused < 1.15 * flat[1024].as_fused


@pytest.mark.parametrize("blocks", [3, 4, 5, 30])
def test_a_range_spread_over_blocks_has_its_minimum_median_and_maximum(blocks):
    real = INPUTS["ffn.2"]
    found = real.spread(blocks)
    assert len(found) == blocks
    assert (min(found), max(found)) == pytest.approx((real.low, real.high))
    assert statistics.median(found) == pytest.approx(real.median)


def test_an_error_just_beyond_its_aim_does_not_look_like_the_aim():
    result = VariantResult(OFFERED, (0.01, OFFERED.aim + 2e-6), 40.0, 1.0)
    study = study_of(result)
    aim = f"{OFFERED.aim:.2%}"
    (said,) = [sentence for sentence in study.sentences if "misses its aim" in sentence]
    assert f"{aim} in the worst step" not in said
    assert f"{OFFERED.aim + 2e-6:.4%} in the worst step, aim {aim}" in said


def test_a_miss_names_the_linears_that_cause_it():
    mixed = next(variant for variant in VARIANTS if variant.name == "nvfp4-ffn")
    errors = {
        "int8 in self_attn.o": 0.004,
        "nvfp4 in ffn.0": 0.02,
        "nvfp4 in ffn.2": 0.031,
        "nvfp4 in self_attn.o": 0.3,
    }
    parts = tuple(PartError(name, error) for name, error in errors.items())
    said = [replace(study_of(VariantResult(mixed, (e,), 40.0, 1.0)), parts=parts).sentences[0] for e in (0.05, 0.01)]
    assert said[0].endswith("; alone ffn.2 3.1%, ffn.0 2.0%, self_attn.o 0.4%")
    assert "alone" not in said[1]


def test_every_variant_that_can_be_exported_has_an_aim():
    assert [variant.name for variant in VARIANTS if not variant.ablation and not variant.aim] == []
