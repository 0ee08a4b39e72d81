"""Input tensors become the request that they describe."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from triton_repo.job_request import parse_request
from triton_repo.settings import Limits
from wan22.bundle import read_manifest
from wan22.errors import UserError
from wan22.specs import SPECS

T2V = SPECS["t2v-a14b-tiny"]
SMALL = {
    "prompt": np.array([b"a fox"], np.object_),
    "width": np.array([64], np.int32),
    "height": np.array([64], np.int32),
    "num_frames": np.array([5], np.int32),
}


@pytest.fixture
def job_of(tiny_engines):
    """``job_of(inputs)`` → the job, for engines of any size unless ``changes`` fix one."""
    manifest = read_manifest(tiny_engines, "engines")

    def parse(inputs, **changes):
        return parse_request(inputs, replace(manifest, **changes), Limits.of(manifest.spec))

    return parse


def test_a_boundary_comes_as_it_was_typed(job_of):
    request = job_of({**SMALL, "boundary": np.array([0.8], np.float32)}).request
    assert request.boundary == 0.8
    assert [request.with_switch(T2V).expert_at(t) for t in (800, 799)] == ["high_noise", "low_noise"]
    assert job_of(SMALL).request.boundary is None


@pytest.mark.parametrize("name", [b"lightning", b"lightx2v-4step"])
def test_a_preset_goes_by_both_of_its_names(job_of, name):
    request = job_of({**SMALL, "preset": np.array([name], np.object_)}).request
    assert request.noise_schedule().timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625])
    assert request.switch_step == 2


def ms(value):
    return np.array([value], np.int64)


def test_a_deadline_is_a_duration_whatever_the_clocks_say(job_of, monkeypatch):
    def deadline_s(**inputs):
        return job_of({**SMALL, **inputs}).deadline_s

    assert deadline_s() == math.inf
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert deadline_s(deadline_ms=ms(1500)) == 1.5
    assert deadline_s(deadline_unix_ms=ms(10**12 + 2500)) == 2.5
    assert deadline_s(deadline_ms=ms(1500), deadline_unix_ms=ms(10**12 + 2500)) == 1.5
    for late in ({"deadline_ms": ms(0)}, {"deadline_unix_ms": ms(10**12)}):
        with pytest.raises(UserError, match="a deadline in the past"):
            deadline_s(**late)


def test_engines_of_one_size_make_it_unless_asked_for_another(job_of):
    fixed = (64, 48, 9)
    complete = job_of({"prompt": SMALL["prompt"]}, size=fixed).request
    assert (complete.width, complete.height, complete.frames) == fixed
    with pytest.raises(UserError, match="64x48, 9 frames, which the engines were built for"):
        job_of(SMALL, size=fixed)
