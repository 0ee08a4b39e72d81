"""The rungs from an image to the transformer's image inputs."""

from collections.abc import Iterator

import numpy as np

from validate.ladder import thresholds
from validate.ladder.comparison import Comparison
from validate.ladder.metrics import compare
from validate.ladder.row import Row

MASK_CHANNELS = 4


def pixels(comparison: Comparison) -> Iterator[Row]:
    """Compare the images scaled and cropped to the size of the video."""
    request = comparison.request
    stretched = comparison.spec.takes.resizing == "stretch" and request.fit == "official"
    whose = "torch's bicubic" if stretched else "Pillow's Lanczos"
    for name, image in comparison.images.items():
        ours = comparison.ours.pixels(image, (request.width, request.height), request.fit)
        note = f"{image.width}x{image.height} to {request.width}x{request.height}, {whose}"
        yield Row(f"pixels of the {name}", "image", compare(ours, comparison.pixels[name]), thresholds.PIXELS, note)


def encoder(comparison: Comparison) -> Iterator[Row]:
    """Compare our VAE encoder on the reference's pixels: each of its two graphs, then the whole video."""
    ours, theirs = comparison.ours.encode(comparison.condition.video), comparison.condition.latents
    frames = comparison.condition.video.shape[2]
    note = "the reference's pixels" if frames == 1 else f"the reference's pixels in {frames} frames"
    limit, metrics = comparison.limits["vae_encoder_first"], compare(ours[:, :, :1], theirs[:, :, :1])
    yield Row("encode of the first frame", "vae_encoder_first", metrics, limit.vae, note)
    if frames > 1:
        limit, metrics = comparison.limits["vae_encoder_next"], compare(ours[:, :, 1:], theirs[:, :, 1:])
        yield Row("encode of the later frames", "vae_encoder_next", metrics, limit.vae, note)
        name = "streaming encode against whole encode"
        yield Row(name, "vae_encoder_next", compare(ours, theirs), limit.streaming, note)


def condition(comparison: Comparison) -> Iterator[Row]:
    """Compare the path from image to transformer input, each side by itself."""
    ours, limit = comparison.our_image_inputs, comparison.limits["vae_encoder_first"].vae
    theirs = comparison.condition
    if theirs.mask is None:
        assert ours.first_frame is not None
        metrics = compare(ours.first_frame, theirs.latents)
        yield Row("encoded image", "image", metrics, limit, "latent frame 0 of every step")
        return
    assert ours.condition is not None
    mask, latents = np.split(ours.condition, [MASK_CHANNELS], axis=1)
    note = "1 where a frame is given"
    yield Row("mask of the condition", "image", compare(mask, theirs.mask), thresholds.MASK, note)
    metrics = compare(latents, theirs.latents)
    yield Row("latents of the condition", "image", metrics, limit, "constant over the run")
