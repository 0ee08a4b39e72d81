"""The rungs from an image to the transformer's image inputs."""

from collections.abc import Iterator

import numpy as np

from validate.ladder import thresholds
from validate.ladder.comparison import Comparison
from validate.ladder.metrics import compare
from validate.ladder.row import Row
from validate.reference.parts import F32

MASK_CHANNELS = 4


def pixels(comparison: Comparison) -> Iterator[Row]:
    """Compare the images scaled and cropped to the size of the video."""
    request = comparison.request
    whose = (
        "torch's bicubic"
        if comparison.spec.takes.resizing == "stretch" and request.fit == "official"
        else "Pillow's Lanczos"
    )
    for name, image in comparison.images.items():
        ours = comparison.ours.pixels(image, (request.width, request.height), request.fit)
        note = f"{image.width}x{image.height} to {request.width}x{request.height}, {whose}"
        yield Row(f"pixels of the {name}", "image", compare(ours, comparison.pixels[name]), thresholds.PIXELS, note)


def encoder(comparison: Comparison) -> Iterator[Row]:
    """Compare our VAE encoder on the reference's pixels: each of its two graphs, then the whole video."""
    ours, theirs = comparison.ours.encode(comparison.condition.video), comparison.condition.latents
    frames = comparison.condition.video.shape[2]
    note = "the reference's pixels" if frames == 1 else f"the reference's pixels in {frames} frames"
    limit = comparison.limits["vae_encoder_first"]
    yield Row(
        "encode of the first frame", "vae_encoder_first", compare(ours[:, :, :1], theirs[:, :, :1]), limit.vae, note
    )
    if frames > 1:
        limit = comparison.limits["vae_encoder_next"]
        yield Row(
            "encode of the later frames", "vae_encoder_next", compare(ours[:, :, 1:], theirs[:, :, 1:]), limit.vae, note
        )
        yield Row(
            "streaming encode against whole encode", "vae_encoder_next", compare(ours, theirs), limit.streaming, note
        )


def condition(comparison: Comparison) -> Iterator[Row]:
    """Compare the path from image to transformer input, each side by itself."""
    ours, limit = comparison.our_image_inputs, comparison.limits["vae_encoder_first"].vae
    if comparison.condition.mask is None:
        metrics = compare(_not_none(ours.first_frame), comparison.condition.latents)
        yield Row("encoded image", "image", metrics, limit, "latent frame 0 of every step")
        return
    mask, latents = np.split(_not_none(ours.condition), [MASK_CHANNELS], axis=1)
    note = "1 where a frame is given"
    yield Row("mask of the condition", "image", compare(mask, comparison.condition.mask), thresholds.MASK, note)
    yield Row(
        "latents of the condition",
        "image",
        compare(latents, comparison.condition.latents),
        limit,
        "constant over the run",
    )


def _not_none(array: F32 | None) -> F32:
    assert array is not None
    return array
