"""Our end-to-end runs against diffusers' pipelines, in which only the loading of the weights is ours.

They are asked as their users ask them: an image, embeddings, noise, steps, guidance. So this holds the reference of the
ladder to account as well: its loop, its conditions, the times of TI2V's tokens and its float64 sinusoid.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from export.checkpoint.checkpoint import open_checkpoint
from runtime.pipeline import Pipeline
from runtime.request import Request
from validate.ladder.metrics import compare
from validate.reference.parts import load_part
from validate.reference.reference import Reference
from wan22.progress import silent
from wan22.specs import SPECS

pytestmark = pytest.mark.slow

# Float32 sums in another order and diffusers' float32 sinusoid, over a run with guidance
LIMIT = 1e-4
SIZE = (96, 64)
GUIDANCE = {"high_noise": 3.5, "low_noise": 2.5, "dit": 5.0}


def module(checkpoint, part):
    """The reference's module with diffusers' sinusoid."""
    from diffusers.models.embeddings import Timesteps

    loaded = load_part(checkpoint, part, silent)
    if part not in ("vae", "text_encoder"):
        loaded.condition_embedder.timesteps_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return loaded


def diffusers_latents(checkpoint, request):
    """The final latents ``[1, z, T, h, w]`` of diffusers' pipeline for the model and request."""
    import diffusers

    spec = checkpoint.spec
    reference, experts = Reference(checkpoint), [module(checkpoint, expert) for expert in spec.experts]
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.shift
    )
    kind = diffusers.WanPipeline if request.image is None else diffusers.WanImageToVideoPipeline
    pipeline = kind(
        tokenizer=None,
        text_encoder=None,
        vae=module(checkpoint, "vae"),
        scheduler=scheduler,
        transformer=experts[0],
        transformer_2=experts[1] if len(experts) > 1 else None,
        boundary_ratio=spec.sampling.boundary,
        expand_timesteps=spec.sampling.boundary is None,
    )
    pipeline.set_progress_bar_config(disable=True)
    text = [
        torch.from_numpy(reference.embeddings(reference.token_ids(prompt)))
        for prompt in (request.prompt, request.negative_prompt)
    ]
    scales = [request.guidance[expert] for expert in spec.experts]
    images = {"image": request.image, "last_image": request.last_image} if request.image else {}
    return pipeline(
        **images,
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=scales[0],
        guidance_scale_2=scales[1] if len(scales) > 1 else None,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).frames.numpy()


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE[::-1], 3), np.uint8))


CASES = {
    "t2v": ("t2v-a14b-tiny", ()),
    "i2v": ("i2v-a14b-tiny", (picture(1),)),
    "first and last frame": ("i2v-a14b-tiny", (picture(1), picture(2))),
    "ti2v with text": ("ti2v-5b-tiny", ()),
    "ti2v with an image": ("ti2v-5b-tiny", (picture(3),)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_final_latents_agree(case, flow_of, tmp_path):
    model, images = CASES[case]
    flow, spec = flow_of(model), SPECS[model]
    paths = [tmp_path / "first.png", tmp_path / "last.png"][: len(images)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)  # of the size of the video, because the two projects scale differently
    request = Request(
        "A fox in the snow",
        size=SIZE,
        frames=9,
        steps=6,
        seed=11,
        image=paths[0] if paths else None,
        last_image=paths[1] if len(paths) > 1 else None,
        guidance={expert: GUIDANCE[expert] for expert in spec.experts},
        schedule="diffusers",
    ).completed(spec)
    with Pipeline.open(flow.engines) as pipeline:
        *_, last = pipeline.denoise(request)
    expected = diffusers_latents(open_checkpoint(flow.checkpoint), request)
    assert compare(last.latents, expected).relative_l2 < LIMIT
