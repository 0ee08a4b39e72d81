"""The rungs from an image to what the transformer is given of it."""

from collections.abc import Iterator

import numpy as np

from validate.ladder import thresholds
from validate.ladder.comparison import Climb
from validate.ladder.metrics import compare
from validate.ladder.row import Row
from validate.reference.parts import F32

MASK_CHANNELS = 4


def pixels(climb: Climb) -> Iterator[Row]:
    """An image scaled and cut to the size of the video."""
    request = climb.request
    whose = (
        "torch's bicubic"
        if climb.spec.takes.resizing == "stretch" and request.fit == "official"
        else "Pillow's Lanczos"
    )
    for name, image in climb.images.items():
        ours = climb.ours.pixels(image, (request.width, request.height), request.fit)
        note = f"{image.width}x{image.height} to {request.width}x{request.height}, {whose}"
        yield Row(f"pixels of the {name}", "image", compare(ours, climb.pixels[name]), thresholds.PIXELS, note)


def encoder(climb: Climb) -> Iterator[Row]:
    """Our VAE encoder on the reference's pixels; its two graphs apart, then the whole video."""
    ours, theirs = climb.ours.encode(climb.condition.video), climb.condition.latents
    frames = climb.condition.video.shape[2]
    note = "the reference's pixels" if frames == 1 else f"the reference's pixels in {frames} frames"
    limit = climb.limits["vae_encoder_first"]
    yield Row(
        "encode of the first frame", "vae_encoder_first", compare(ours[:, :, :1], theirs[:, :, :1]), limit.vae, note
    )
    if frames > 1:
        limit = climb.limits["vae_encoder_next"]
        yield Row(
            "encode of the later frames", "vae_encoder_next", compare(ours[:, :, 1:], theirs[:, :, 1:]), limit.vae, note
        )
        yield Row(
            "streaming encode against whole encode", "vae_encoder_next", compare(ours, theirs), limit.streaming, note
        )


def condition(climb: Climb) -> Iterator[Row]:
    """From the image to the input of the transformer, each side on its own."""
    ours, limit = climb.our_given, climb.limits["vae_encoder_first"].vae
    if climb.condition.mask is None:
        metrics = compare(_given(ours.first_frame), climb.condition.latents)
        yield Row("encoded image", "image", metrics, limit, "latent frame 0 of every step")
        return
    mask, latents = np.split(_given(ours.condition), [MASK_CHANNELS], axis=1)
    note = "1 where a frame is given"
    yield Row("mask of the condition", "image", compare(mask, climb.condition.mask), thresholds.MASK, note)
    yield Row(
        "latents of the condition", "image", compare(latents, climb.condition.latents), limit, "constant over the run"
    )


def _given(found: F32 | None) -> F32:
    assert found is not None
    return found
