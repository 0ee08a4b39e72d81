"""Decoding chunk by chunk gives the frames of diffusers' whole decode."""

import numpy as np
import pytest

from export.graphs.builder import FLOAT16
from tests.export.graphs.vae_chunks import MODELS, Half, decoded
from wan22.specs import SPECS

TIME_CONVOLUTIONS = (11, 18)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def decoder(model, tmp_path_factory):
    return Half.of(model, "decoder", tmp_path_factory.mktemp(model))


def latents(model, frames, rows, columns):
    shape = (1, SPECS[model].vae.latent_channels, frames, rows, columns)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(5, 4, 6), (2, 6, 2), (1, 3, 5)], ids=["video", "portrait", "odd image"])
def test_chunks_equal_the_whole_decode_at_any_size(model, decoder, shape):
    z = latents(model, *shape)
    frames, expected = decoder(z, chunk=1), decoded(model, z)
    assert frames.shape == expected.shape
    assert np.abs(frames - expected).max() <= 1e-5
    assert expected.std() > 0.1 and np.mean(np.abs(expected) == 1) < 0.5  # the weights exercise the range


def test_the_first_chunk_leaves_the_time_convolutions_no_history(model, decoder):
    decoder(latents(model, 1, 4, 6), chunk=1)
    silent = [index for index, cache in enumerate(decoder.caches()) if not cache.any()]
    assert silent == list(TIME_CONVOLUTIONS)


def test_the_first_chunk_leaves_one_frame_of_zeros_before_its_own(model, decoder):
    decoder(latents(model, 1, 4, 6), chunk=1)
    others = [c for index, c in enumerate(decoder.caches()) if index not in TIME_CONVOLUTIONS]
    assert not any(c[:, :, 0].any() for c in others)
    assert all(c[:, :, 1].any() for c in others)


@pytest.mark.parametrize("frames", [1, 2], ids=["first", "next"])
def test_caches_have_the_shapes_of_the_spec(model, decoder, frames):
    decoder(latents(model, frames, 4, 6), chunk=1)
    expected = [(1, c.channels, c.frames, 4 * c.scale, 6 * c.scale) for c in SPECS[model].vae.decoder_caches]
    assert [c.shape for c in decoder.caches()] == expected


def test_half_precision_stays_near(model, tmp_path):
    z = latents(model, 3, 4, 6)
    frames = Half.of(model, "decoder", tmp_path, FLOAT16)(z, chunk=1)
    error = frames - decoded(model, z)
    assert frames.dtype == np.float32
    assert 0 < np.sqrt(np.mean(error**2)) < 2e-3
