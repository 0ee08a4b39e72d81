"""The built-in image is always the same, has any size, and is hard to scale."""

import io

import numpy as np
import pytest
from PIL import Image

from runtime.image_condition import video_size
from validate.sample_image import built_in_picture, picture_for
from wan22.specs import SPECS


def pixels_of(width, height):
    return np.asarray(Image.open(io.BytesIO(built_in_picture(width, height)))).astype(int)


@pytest.mark.parametrize("size", [(384, 240), (240, 384), (1920, 1080), (16, 16)])
def test_any_size(size):
    assert pixels_of(*size).shape == (size[1], size[0], 3)


def test_it_is_always_the_same():
    assert built_in_picture(384, 240) == built_in_picture(384, 240)


def test_it_has_smooth_ground_and_edges_one_pixel_apart():
    steps = np.abs(np.diff(pixels_of(384, 240), axis=1)).max(axis=-1)
    assert (steps <= 1).mean() > 0.9
    assert ((steps[:, 1:] > 150) & (steps[:, :-1] > 150)).any()


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS.values() if spec.takes.image != "no"], ids=lambda spec: spec.name
)
def test_the_video_made_of_it_has_the_size_it_was_drawn_for(spec):
    for size in spec.sampling.sizes:
        image = Image.open(io.BytesIO(picture_for(size)))
        assert video_size(spec, image.size, size) == size
        assert image.size > size
