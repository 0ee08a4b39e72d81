"""The reference's path from an image to the condition, compared with ours where no engine is needed."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from export.checkpoint.checkpoint import open_checkpoint
from export.synth.checkpoint import synthesise
from runtime.image_condition import conditioning_mask, conditioning_video, fit_image
from validate.ladder.metrics import compare
from validate.ladder.thresholds import MASK, PIXELS
from validate.reference.image import pixels
from validate.reference.reference import ImageInputs, Reference
from wan22.specs import SPECS

NOISY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), np.uint8))
PHOTO = Image.linear_gradient("L").resize((150, 90)).convert("RGB")


@pytest.fixture(scope="module")
def references_of(tmp_path_factory):
    """A tiny model by name → references of one checkpoint in both layouts."""

    @cache
    def made(model):
        root, layouts = tmp_path_factory.mktemp(model), ("official", "diffusers")
        for layout in layouts:
            synthesise(SPECS[model], root / layout, layout, seed=0)
        return [Reference(open_checkpoint(root / layout)) for layout in layouts]

    return made


@pytest.mark.parametrize("image", [NOISY, PHOTO])
@pytest.mark.parametrize("size", [(64, 48), (48, 96), (128, 128)])
@pytest.mark.parametrize(
    ("resizing", "fit"), [("stretch", "official"), ("cover", "official"), ("stretch", "crop"), ("cover", "crop")]
)
def test_our_pixels_are_those_of_torch_and_pillow(image, size, resizing, fit):
    expected = pixels(image, resizing, size, fit)
    assert expected.shape == (1, 3, size[1], size[0])
    assert PIXELS.accepts(compare(fit_image(image, resizing, size, fit)[:, :, 0], expected))


def test_i2v_stretches_without_antialiasing():
    overshoot = pixels(NOISY, "stretch", (64, 48), "official")
    assert overshoot.abs().max() > 1.1
    assert pixels(NOISY, "cover", (64, 48), "official").abs().max() <= 1


def official_mask(frames, height, width):
    """wan22.md §6.1, the frame mask with frame 0 repeated, grouped by 4 into channels."""
    mask = torch.ones(1, frames, height, width)
    mask[:, 1:] = 0
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, mask.shape[1] // 4, 4, height, width).transpose(1, 2).numpy()


def test_i2v_gets_a_mask_of_its_conditioning_frames(references_of):
    reference, _ = references_of("i2v-a14b-tiny")
    first, last = (np.full((1, 3, 32, 48), value, np.float32) for value in (0.5, -0.25))
    alone, both = reference.condition(first, 9), reference.condition(first, 9, last)
    assert MASK.accepts(compare(alone.mask, official_mask(9, 4, 6)))
    assert MASK.accepts(compare(conditioning_mask(3, 4, 6), alone.mask))
    assert MASK.accepts(compare(conditioning_mask(3, 4, 6, has_last=True), both.mask))
    assert np.array_equal(both.video, conditioning_video(first[:, :, None], 9, last[:, :, None]))
    assert np.array_equal(alone.video, conditioning_video(first[:, :, None], 9))
    assert alone.image_inputs.condition.shape == (1, 20, 3, 4, 6)


def test_ti2v_gets_one_encoded_frame(references_of):
    reference, _ = references_of("ti2v-5b-tiny")
    found = reference.condition(np.full((1, 3, 64, 64), 0.5, np.float32), 9)
    assert found.image_inputs.first_frame.shape == (1, 48, 1, 4, 4)
    assert found.image_inputs.condition is None


@pytest.mark.parametrize("model", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_both_layouts_give_the_same(references_of, model):
    references, spec, random = references_of(model), SPECS[model], np.random.default_rng(1)
    image = random.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    latents = random.standard_normal(spec.latent_shape(64, 64, 5), np.float32)
    text = random.standard_normal((1, 512, spec.dit.text_width), np.float32)
    given, same = (reference.condition(image, 5).image_inputs for reference in references)
    for expert in spec.experts:
        one, other = (r.velocity(expert, latents, 950.0, text, given) for r in references)
        assert np.array_equal(one, other)
    assert _equal(given.condition, same.condition)
    assert _equal(given.first_frame, same.first_frame)


def _equal(one, other):
    return (one is None and other is None) or np.array_equal(one, other)


def test_the_image_inputs_change_the_velocity(references_of):
    random = np.random.default_rng(2)
    for model, nothing in (("i2v-a14b-tiny", np.zeros((1, 20, 1, 4, 4), np.float32)), ("ti2v-5b-tiny", None)):
        reference, spec = references_of(model)[0], SPECS[model]
        side = 4 * spec.vae.spatial_stride
        latents = random.standard_normal(spec.latent_shape(side, side, 1), np.float32)
        text = random.standard_normal((1, 512, spec.dit.text_width), np.float32)
        given = reference.condition(np.full((1, 3, side, side), 0.5, np.float32), 1).image_inputs
        expert = spec.experts[0]
        found = reference.velocity(expert, latents, 950.0, text, given)
        without = reference.velocity(expert, latents, 950.0, text, ImageInputs(condition=nothing))
        assert compare(found, without).relative_l2 > 1e-2
