"""Memory is measured in a separate process that has loaded only what the piece needs."""

import pytest

from runtime.request import Request
from validate.bench.footprint import FootprintJob, footprint
from validate.bench.work import OURS, RUN, BenchOptions
from wan22.errors import UserError


def test_a_piece_needs_its_weights_beyond_the_libraries(tiny_engines):
    options = BenchOptions(Request(size=(64, 64), frames=5))
    found = footprint(FootprintJob(OURS, "vae_decoder", tiny_engines, None, options))
    weights = (tiny_engines / "vae_decoder.safetensors").stat().st_size
    assert 0 < found.libraries < found.loaded < found.peak
    assert found.beyond_libraries > weights
    assert found.device is None or found.device > 0
    assert set(found.as_json()) >= {"libraries_bytes", "loaded_bytes", "peak_bytes"}


def test_a_whole_run_needs_more_than_its_engines(tiny_engines):
    found = footprint(
        FootprintJob(OURS, RUN, tiny_engines, None, BenchOptions(Request(size=(32, 32), frames=5, steps=2)))
    )
    both = (tiny_engines / f"{name}.safetensors" for name in ("text_encoder", "vae_decoder"))
    assert found.libraries <= found.loaded < found.peak
    assert found.beyond_libraries > sum(path.stat().st_size for path in both)


def test_an_error_of_the_child_process_is_raised_in_this_one(tiny_engines):
    with pytest.raises(UserError, match="size 50x50"):
        footprint(FootprintJob(OURS, "vae_decoder", tiny_engines, None, BenchOptions(Request(size=(50, 50)))))
