"""Kernel timings outlive a build, and an unusable cache path is refused before the build."""

from types import SimpleNamespace

import pytest

from engines.gpu.timing_cache import timing_cache
from wan22.errors import UserError


class TimingConfig:
    """The part of TensorRT's configuration that TensorRT-RTX lacks."""

    def __init__(self):
        self.loaded = None

    def create_timing_cache(self, content):
        return bytes(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.loaded = cache

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.loaded + b"+")


def test_kernel_timings_are_kept_over_builds_and_of_a_failed_one_nothing(tmp_path):
    timings = tmp_path / "new" / "timings"
    for kept in (b"+", b"++"):
        with timing_cache(TimingConfig(), timings):
            pass
        assert timings.read_bytes() == kept
    with pytest.raises(UserError), timing_cache(TimingConfig(), timings):
        raise UserError("a build", "to succeed", "fix it")
    assert [path.name for path in timings.parent.iterdir()] == ["timings"]
    assert timings.read_bytes() == b"++"


def test_a_place_that_cannot_hold_timings_is_told_before_the_build(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "timings"):
        with pytest.raises(UserError, match="timing cache"), timing_cache(TimingConfig(), place):
            raise AssertionError("it was built")
