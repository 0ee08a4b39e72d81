"""Encoding chunk by chunk gives the normalised latents of diffusers' whole encode."""

import numpy as np
import pytest

from export.graphs.builder import FLOAT16
from tests.export.graphs.vae_chunks import MODELS, Half, encoded
from wan22.specs import SPECS


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(model, tmp_path_factory):
    return Half.of(model, "encoder", tmp_path_factory.mktemp(model))


def video(model, frames, rows, columns):
    """Frames of ``rows`` × ``columns`` latents."""
    stride = SPECS[model].vae.spatial_stride
    shape = (1, 3, frames, rows * stride, columns * stride)
    return np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 4, 6), (5, 3, 5), (9, 6, 2), (13, 4, 6)], ids=lambda shape: f"{shape[0]}")
def test_chunks_equal_the_whole_encode_at_any_size(model, encoder, shape):
    x = video(model, *shape)
    latents, expected = encoder(x, chunk=4), encoded(model, x)
    assert latents.shape == expected.shape
    assert np.abs(latents - expected).max() <= 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("frames", [1, 5], ids=["first", "next"])
def test_caches_have_the_shapes_of_the_spec(model, encoder, frames):
    encoder(video(model, frames, 4, 6), chunk=4)
    expected = [(1, c.channels, c.frames, 4 * c.scale, 6 * c.scale) for c in SPECS[model].vae.encoder_caches]
    assert [c.shape for c in encoder.caches()] == expected


def test_half_precision_stays_near(model, tmp_path):
    x = video(model, 5, 4, 6)
    latents, expected = Half.of(model, "encoder", tmp_path, FLOAT16)(x, chunk=4), encoded(model, x)
    assert latents.dtype == np.float32
    assert 0 < np.linalg.norm(latents - expected) / np.linalg.norm(expected) < 5e-3
