"""Input tensors become the request that they describe."""

import math
import time

import numpy as np
import pytest

from triton_repo.settings import Limits
from triton_repo.wanted import wanted
from wan22.errors import UserError
from wan22.specs import SPECS

T2V = SPECS["t2v-a14b-tiny"]
SMALL = {
    "prompt": np.array([b"a fox"], np.object_),
    "width": np.array([64], np.int32),
    "height": np.array([64], np.int32),
    "num_frames": np.array([5], np.int32),
}


def request_of(**inputs):
    return wanted({**SMALL, **inputs}, T2V, None, Limits.of(T2V)).request


def test_a_boundary_comes_as_it_was_typed():
    request = request_of(boundary=np.array([0.8], np.float32))
    assert request.boundary == 0.8
    assert [request.switched(T2V).expert_at(t) for t in (800, 799)] == ["high_noise", "low_noise"]
    assert request_of().boundary is None


@pytest.mark.parametrize("name", [b"lightning", b"lightx2v-4step"])
def test_a_preset_goes_by_both_of_its_names(name):
    request = request_of(preset=np.array([name], np.object_))
    assert request.noise_schedule().timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625])
    assert request.switch_step == 2


def ms(value):
    return np.array([value], np.int64)


def wanted_of(**inputs):
    return wanted({**SMALL, **inputs}, T2V, None, Limits.of(T2V))


def test_a_deadline_is_a_duration_whatever_the_clocks_say(monkeypatch):
    assert wanted_of().deadline_s == math.inf
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert wanted_of(deadline_ms=ms(1500)).deadline_s == 1.5
    assert wanted_of(deadline_unix_ms=ms(10**12 + 2500)).deadline_s == 2.5
    assert wanted_of(deadline_ms=ms(1500), deadline_unix_ms=ms(10**12 + 2500)).deadline_s == 1.5
    for late in ({"deadline_ms": ms(0)}, {"deadline_unix_ms": ms(10**12)}):
        with pytest.raises(UserError, match="a deadline that has passed"):
            wanted_of(**late)


def test_engines_of_one_size_make_it_unless_asked_for_another():
    fixed = (64, 48, 9)
    prompt = {"prompt": SMALL["prompt"]}
    complete = wanted(prompt, T2V, None, Limits.of(T2V), fixed).request
    assert (complete.width, complete.height, complete.frames) == fixed
    with pytest.raises(UserError, match="64x48, 9 frames, which the engines are made for"):
        wanted(SMALL, T2V, None, Limits.of(T2V), fixed)
