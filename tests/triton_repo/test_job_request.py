"""Input tensors become the request that they describe."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from runtime.request import Request
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


def text(value):
    return np.array([value.encode()], np.object_)


def test_a_step_cache_crosses_the_wire(job_of):
    from triton_repo.wire import inputs_of
    from wan22.caching import Caching

    for caching in (
        Caching(easy=True, threshold=0.2, first_exact=4, last_exact=3, max_consecutive=5, reuse="taylor1"),
        Caching(skip_steps=(3, 9), reuse="hold", late_cfg=(12,)),
        Caching(late_cfg="auto"),
        None,
    ):
        sent = {name: value for name, value in inputs_of(Request("x", cache=caching)).items() if value is not None}
        named = {"cache_threshold": np.float32, "first_exact": np.int32, "last_exact": np.int32}
        named |= {"max_consecutive": np.int32}
        tensors = {
            name: text(value) if isinstance(value, str) else np.array([value], named[name])
            for name, value in sent.items()
            if name not in SMALL and name not in ("seed", "fit")
        }
        assert job_of({**SMALL, "steps": np.array([40], np.int32), **tensors}).request.cache == caching
    magcache = job_of({**SMALL, "steps": np.array([40], np.int32), "skip_steps": text("magcache")}).request.cache
    assert magcache.skip_steps[:2] == (11, 12)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({"cache": text("tea")}, "cache 'tea' | expected one of easy"),
        ({"first_exact": np.array([3], np.int32)}, "first_exact without a cache"),
        ({"reuse": text("guess"), "cache": text("easy")}, "reuse 'guess'"),
        ({"reuse": text("hold")}, "reuse without skipped steps"),
        ({"cache": text("easy"), "skip_steps": text("11")}, "cache with skip_steps | expected one of them"),
        ({"cache": text("easy"), "skip_steps": text("magcache")}, "cache with skip_steps"),
        ({"skip_steps": text("5,6"), "late_cfg": text("5,6")}, "skip and late-cfg step 5, 6"),
        ({"late_cfg": text("4"), "guidance_high_noise": np.array([1], np.float32)}, "late-cfg step 4"),
        ({"skip_steps": text("1;2")}, "skip_steps '1;2'"),
        ({"skip_steps": text("1," * 600)}, "skip_steps of 1200 bytes"),
        ({"skip_steps": text("/etc/passwd")}, "skip_steps '/etc/passwd'"),
        ({"cache": text("easy"), "steps": np.array([4], np.int32)}, "a step cache with 4 steps"),
    ],
)
def test_step_caches_that_do_not_fit_are_refused(job_of, inputs, found):
    with pytest.raises(UserError) as error:
        job_of({**SMALL, "steps": np.array([40], np.int32), **inputs})
    assert str(error.value).startswith(found)
