"""The limits are those that the project promises; coarser arithmetic has wider ones."""

from dataclasses import fields

import pytest

from validate.ladder.thresholds import (
    AT_LEAST,
    BF16,
    FP16,
    FP32,
    SIGMAS,
    TIMESTEPS,
    TOKEN_IDS,
    Thresholds,
    thresholds_for,
)
from wan22.precision import Precision


def test_the_promise_of_float32():
    assert (TOKEN_IDS.value, TIMESTEPS.value, SIGMAS.value) == (0, 0, 1e-6)
    promised = Thresholds.__annotations__.keys()
    assert {name: getattr(FP32, name).value for name in promised} == {
        "text": 1e-4,
        "velocity": 1e-5,
        "latents": 1e-3,
        "vae": 1e-4,
        "streaming": 1e-5,
        "frames": 60,
        "ssim": 0.999,
    }


@pytest.mark.parametrize("name", [field.name for field in fields(Thresholds)])
def test_limits_widen_from_fp32_over_fp16_to_bf16(name):
    fp32, fp16, bf16 = (getattr(limits, name) for limits in (FP32, FP16, BF16))
    assert fp32.measure == fp16.measure == bf16.measure
    ordered = sorted((fp32.value, fp16.value, bf16.value), reverse=fp32.measure in AT_LEAST)
    assert ordered == [fp32.value, fp16.value, bf16.value]
    assert all(limit.reason for limit in (fp32, fp16, bf16))


def test_limits_never_tighten_from_one_precision_to_the_next():
    for name in (field.name for field in fields(Thresholds)):
        values = [getattr(thresholds_for(precision), name).value for precision in (Precision.BF16, Precision.FP8)]
        assert values == sorted(values, reverse=getattr(BF16, name).measure in AT_LEAST)
    assert thresholds_for(Precision.FP8_ATTN) is thresholds_for(Precision.FP8)
