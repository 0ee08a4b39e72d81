"""``WanTrtPipeline`` beside diffusers' own pipelines: the same script, only the class differs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from engines.build import build_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.diffusers import WanTrtPipeline
from wan_trt.diffusers.values import as_array

NEGATIVE = "Bright tones, overexposed, static"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """diffusers' pipeline and ours of a tiny model, from one checkpoint in diffusers' layout."""
    kept = {}

    def both(model, kind=WanPipeline):
        if model not in kept:
            root = tmp_path_factory.mktemp(model)
            synthesise(SPECS[model], root / "checkpoint", "diffusers", seed=0)
            export_checkpoint(root / "checkpoint", root / "onnx", ExportOptions(Precision.FP32))
            build_engines(root / "onnx", root / "engines")
            ours = WanTrtPipeline.from_pretrained(root / "engines", torch_dtype=torch.float32)
            kept[model] = kind.from_pretrained(root / "checkpoint", torch_dtype=torch.float32), ours
            kept[model][0].set_progress_bar_config(disable=True)
        return kept[model]

    return both


def example(pipe, **more):
    """The example of diffusers' Wan page, its size apart."""
    flow_shift = 5.0
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)
    pipe.to("cpu")
    return pipe(
        prompt="A cat and a dog baking a cake together in a kitchen.",
        negative_prompt=NEGATIVE,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=5.0,
        **more,
    ).frames


def test_the_example_of_diffusers_page_makes_the_same_frames(pipelines):
    theirs, ours = (
        example(pipe, generator=torch.Generator().manual_seed(3), guidance_scale_2=2.0)
        for pipe in pipelines("t2v-a14b-tiny")
    )
    assert ours.shape == theirs.shape == (1, 9, 64, 96, 3)
    assert np.abs(ours - theirs).max() < 2e-4
    assert np.abs(ours - ours[:, ::-1]).max() > 0.01


@pytest.mark.parametrize("form", ["pt", "latent", "pil"])
def test_every_output_is_what_diffusers_gives(pipelines, form):
    theirs, ours = (
        example(
            pipe,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            num_videos_per_prompt=2,
            output_type=form,
        )
        for pipe in pipelines("t2v-a14b-tiny")
    )
    assert type(ours) is type(theirs)
    if form == "pil":
        ours, theirs = (np.array([[np.asarray(frame) for frame in video] for video in each]) for each in (ours, theirs))
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    else:
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_callbacks_replace_latents_and_end_the_run_as_in_diffusers(pipelines):
    def halve(pipe, index, timestep, given):
        seen.append((index, float(timestep)))
        pipe._interrupt = index == 2
        return {"latents": given["latents"] / 2} if index == 1 else given

    found = []
    for pipe in pipelines("t2v-a14b-tiny"):
        seen = []
        generator = torch.Generator().manual_seed(3)
        latents = example(pipe, generator=generator, callback_on_step_end=halve, output_type="latent")
        found.append((latents, seen))
    (theirs, their_calls), (ours, our_calls) = found
    assert our_calls == their_calls
    assert len(our_calls) == 3
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


@pytest.mark.parametrize("model", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_an_image_makes_the_same_video_as_in_diffusers(pipelines, model):
    values = np.random.default_rng(5).integers(0, 256, (48, 80, 3), np.uint8)
    image = Image.fromarray(values).resize((160, 96), Image.Resampling.BICUBIC)
    theirs, ours = (
        example(pipe, generator=torch.Generator().manual_seed(3), image=image)
        for pipe in pipelines(model, WanImageToVideoPipeline)
    )
    assert np.abs(ours - theirs).max() < 5e-4


def test_other_schedulers_and_several_prompts(pipelines):
    found = []
    for pipe in pipelines("t2v-a14b-tiny"):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        found.append(
            pipe(
                prompt=["A cat", "A dog"],
                height=64,
                width=64,
                num_frames=6,
                num_inference_steps=3,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(3),
            ).frames
        )
    theirs, ours = found
    assert ours.shape == theirs.shape == (2, 5, 64, 64, 3)
    assert np.abs(ours - theirs).max() < 2e-4


def test_without_torch_a_seed_repeats_and_defaults_are_the_bundles(tiny_engines):
    code = (
        "import sys, numpy as np; from wan_trt.diffusers import WanTrtPipeline\n"
        "with WanTrtPipeline.from_pretrained(sys.argv[1]) as pipe:\n"
        "    call = dict(prompt='A cat', height=64, width=64, num_frames=1, num_inference_steps=2, generator=3)\n"
        "    first, again = (pipe(**call).frames for _ in range(2))\n"
        "    latents = pipe(**call, output_type='latent').frames\n"
        "assert np.array_equal(first, again) and type(latents) is np.ndarray\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, str(tiny_engines)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no prompt"),
        ({"prompt": []}, "prompt []"),
        ({"prompt": 5}, "prompt 5"),
        ({"prompt": "A cat", "negative_prompt": 3}, "negative_prompt 3"),
        ({"prompt": "A cat", "num_videos_per_prompt": 0}, "num_videos_per_prompt 0"),
        ({"prompt": "A cat", "num_videos_per_prompt": 10**9}, "a whole number from 1 to 100000"),
        ({"prompt": "A cat", "num_frames": 5.0}, "num_frames 5.0"),
        ({"prompt": "A cat", "height": 64}, "both or neither"),
        ({"prompt": "A cat", "output_type": "gif"}, "np, pil, pt or latent"),
        ({"prompt": ["A", "B"], "negative_prompt": ["C"]}, "1 negative prompts"),
        ({"prompt": "A cat", "generator": [1, 2]}, "2 generators"),
        ({"prompt": "A cat", "generator": "seven"}, "torch.Generator, a seed"),
        ({"prompt": "A cat", "latents": np.zeros((1, 16, 1, 8, 9))}, "latents [1, 16, 1, 8, 9]"),
        ({"prompt": "A cat", "latents": "noise"}, "latents of str"),
        ({"prompt": "A cat", "latents": np.zeros((1, 16, 1, 8, 8), complex)}, "latents of complex128"),
        ({"prompt": "A cat", "guidance_scale": "3"}, "guidance_scale '3'"),
        ({"prompt": "A cat", "guidance_scale": 3.0, "guidance_scale_2": [2]}, "guidance_scale_2 [2]"),
        ({"prompt": "A cat", "guidance_scale_2": 3.0}, "guidance_scale too"),
        ({"prompt": "A cat", "max_sequence_length": 226}, "max_sequence_length 226"),
        ({"prompt": "A cat", "image": np.zeros((8, 8))}, "one picture in RGB"),
        ({"prompt": "A cat", "image": np.zeros((8, 8, 3))}, "an image for t2v-a14b-tiny"),
    ],
)
def test_what_the_engines_do_not_take_is_refused(tiny_engines, given, told):
    with WanTrtPipeline.from_pretrained(tiny_engines) as pipe, pytest.raises(UserError, match="expected") as refused:
        pipe(**given)
    assert told in str(refused.value)


def test_schedulers_that_no_solver_computes_are_refused(tiny_engines):
    with WanTrtPipeline.from_pretrained(tiny_engines) as pipe:
        for scheduler in (
            UniPCMultistepScheduler.from_config(pipe.scheduler.config, solver_order=3),
            UniPCMultistepScheduler(),
        ):
            pipe.scheduler = scheduler
            with pytest.raises(UserError, match=r"pipe\.scheduler\.config"):
                pipe("A cat")
    with pytest.raises(UserError, match="argument of diffusers"):
        WanTrtPipeline.from_pretrained(tiny_engines, engine="fast")


def test_arrays_of_every_type_of_torch():
    for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int32):
        assert np.array_equal(as_array(torch.tensor([1.0, 2.0]).to(kind)), np.float32([1, 2]))
    for unusable in (torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(UserError, match="dense tensor of real numbers"):
            as_array(unusable)
