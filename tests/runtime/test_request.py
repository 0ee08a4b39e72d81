"""A request is completed with preset and model defaults, and images go where they belong."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from runtime.built_for import fill_defaults
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.schedule import make_schedule
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.sampling import NEGATIVE_PROMPT
from wan22.specs import SPECS, T2V_A14B, TI2V_5B

I2V, TI2V, T2V = (SPECS[f"{name}-tiny"] for name in ("i2v-a14b", "ti2v-5b", "t2v-a14b"))

SWITCHES_OUTSIDE = replace(T2V, sampling=replace(T2V.with_preset("lightning").sampling, switch_step=9))


def picture(width=96, height=64, seed=0):
    stream = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_defaults_are_the_official_ones():
    complete = Request("x").completed(T2V_A14B)
    assert (complete.width, complete.height, complete.frames, complete.steps) == (1280, 720, 81, 40)
    assert complete.guidance == {"high_noise": 4.0, "low_noise": 3.0}
    assert (complete.shift, complete.solver, complete.negative_prompt) == (12.0, "unipc", NEGATIVE_PROMPT)
    assert Request("x", size=(704, 1280)).completed(TI2V_5B).latent_shape == (1, 48, 31, 80, 44)


def test_lightning_is_four_euler_steps_without_guidance():
    complete = Request("x", preset="lightning").completed(T2V_A14B)
    assert not complete.guided
    schedule = make_schedule(complete.solver, complete.steps, complete.shift, complete.schedule)
    assert schedule.timesteps.tolist() == [1000.0, 937.5, pytest.approx(833.3333), 625.0]
    for spec in (T2V_A14B, SPECS["i2v-a14b"]):
        experts = [spec.expert_at(t) for t in schedule.timesteps]
        assert experts == ["high_noise", "high_noise", "low_noise", "low_noise"]


def test_what_the_user_says_beats_the_preset():
    complete = Request("x", preset="mlperf", steps=8, guidance={"low_noise": 2.0}).completed(T2V)
    assert (complete.steps, complete.shift, complete.schedule) == (8, 3.0, "diffusers")
    assert complete.guidance == {"high_noise": 4.0, "low_noise": 2.0}
    assert Request("x", preset="lightning", steps=8, guidance_scale=1).completed(T2V).steps == 8


def test_a_boundary_goes_before_the_bundle_and_before_a_preset():
    asked = Request("x", boundary=0.99).completed(T2V_A14B)
    assert [asked.with_switch(T2V_A14B).expert_at(t, 0) for t in (990, 989)] == ["high_noise", "low_noise"]
    assert Request("x").completed(T2V_A14B).with_switch(T2V_A14B).expert_at(875) == "high_noise"
    assert Request("x", preset="lightning", boundary=0.99).completed(T2V_A14B).switch_step is None


def test_the_step_of_a_switch_counts_only_steps_of_its_own_preset():
    assert Request("x", preset="lightning").completed(T2V_A14B).switch_step == 2
    assert Request("x", preset="lightning", steps=8).completed(T2V_A14B).switch_step is None


def test_a_bundle_samples_with_its_own_preset_until_another_is_asked_for(caplog):
    distilled = T2V_A14B.with_preset("lightx2v-4step")
    own = Request("x").completed(distilled)
    assert own == Request("x", preset="lightning").completed(T2V_A14B)
    assert not caplog.messages
    official = Request("x", preset="official").completed(distilled)
    assert official == Request("x").completed(T2V_A14B)
    assert "40 steps with guidance on a checkpoint distilled for lightx2v-4step" in caplog.text
    with pytest.raises(UserError, match=r"guidance with preset lightx2v-4step \| .* preset official"):
        Request("x", steps=40, guidance={"high_noise": 4.0}).completed(distilled)


def test_a_list_of_noise_levels_takes_no_steps_beside_it():
    listed = replace(T2V, sampling=replace(T2V.sampling, solver="euler", steps=3, sigmas=(1.0, 0.757, 0.522)))
    schedule = Request("x").completed(listed).noise_schedule()
    assert schedule.timesteps.tolist() == pytest.approx([1000, 757, 522])
    with pytest.raises(UserError, match="steps 8 with preset official"):
        Request("x", steps=8).completed(listed)


@pytest.mark.parametrize(
    ("spec", "request_", "told"),
    [
        (T2V, Request("x", image=picture()), "an image for t2v-a14b-tiny"),
        (I2V, Request("x"), "no image for i2v-a14b-tiny"),
        (TI2V, Request("x", image=picture(), last_image=picture()), "a last image for ti2v-5b-tiny"),
        (I2V, Request("x", image=b"GIF?"), "image"),
        (I2V, Request("x", image=picture(1, 1)), "1x1"),
        (T2V, Request("x", preset="thunder"), "preset 'thunder'"),
        (T2V, Request("x", steps=0), "0 steps"),
        (T2V, Request("x", shift=float("nan")), "shift nan"),
        (T2V, Request("x", boundary=875.0), "boundary 875"),
        (T2V, Request("x", boundary=float("nan")), "boundary nan"),
        (TI2V, Request("x", boundary=0.5), "a boundary for ti2v-5b-tiny"),
        (TI2V, Request("x", preset="lightning"), "preset 'lightning' for a ti2v model"),
        (T2V, Request("x", preset="lightning", guidance_scale=4), "guidance with preset lightx2v-4step"),
        (T2V, Request("x", preset="lightning", guidance={"low_noise": 0.0}), "guidance with preset lightx2v-4step"),
        (T2V, Request("x", preset="turbowan-4step"), "preset 'turbowan-4step' for a t2v model"),
        (SWITCHES_OUTSIDE, Request("x"), "expert switch at step 9 | expected a step from 0 to 4"),
        (SWITCHES_OUTSIDE, Request("x", boundary=2.0), "boundary 2"),
        (T2V, Request("x", noise=np.zeros((16, 2, 6, 8), np.float32)), "noise of shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_video_is_refused_before_any_work(spec, request_, told):
    with pytest.raises(UserError, match=told):
        request_.completed(spec)


def test_the_video_has_the_shape_of_the_image_or_exactly_the_size_asked_for():
    request = Request("x", image=picture(64, 128), size=(128, 64))
    assert (request.completed(I2V).width, request.completed(I2V).height) == (64, 128)
    cropped = replace(request, fit="crop").completed(I2V)
    assert (cropped.width, cropped.height) == (128, 64)


def test_an_832x480_image_gives_an_832x480_video_unless_exactly_official():
    request = Request("x", image=picture(832, 480), size=(832, 480))
    assert request.completed(I2V).height == 480
    assert replace(request, exact_official=True).completed(I2V).height == 464


@pytest.mark.parametrize("frames", [1, 9])
def test_i2v_condition_is_mask_and_encoded_video(flow_of, frames):
    with Pipeline.open(flow_of(I2V.name).engines) as pipeline:
        request = Request("x", image=picture(64, 48), size=(64, 48), frames=frames)
        condition = pipeline.image_condition(request.completed(I2V))["condition"]
    assert condition.shape == (1, 20, (frames - 1) // 4 + 1, 6, 8)
    assert (condition[:, :4, 0] == 1).all()
    assert (condition[:, :4, 1:] == 0).all()
    assert 0.1 < condition[:, 4:].std() < 10


def test_a_last_image_changes_the_condition_and_its_mask(flow_of):
    request = Request("x", image=picture(64, 48), last_image=picture(64, 48, seed=1), size=(64, 48), frames=9)
    with Pipeline.open(flow_of(I2V.name).engines) as pipeline:
        with_last = pipeline.image_condition(request.completed(I2V))["condition"]
        without = pipeline.image_condition(replace(request, last_image=None).completed(I2V))["condition"]
    assert (with_last[0, :4, -1, 0, 0] == [0, 0, 0, 1]).all()
    assert np.abs(with_last[:, 4:, -1] - without[:, 4:, -1]).max() > 1e-3
    assert np.abs(with_last[:, 4:, 0] - without[:, 4:, 0]).max() == 0


def test_ti2v_keeps_the_image_in_latent_frame_0(flow_of):
    request = Request("x", image=picture(64, 64), size=(64, 64), frames=9, steps=3)
    with Pipeline.open(flow_of(TI2V.name).engines) as pipeline:
        complete = request.completed(TI2V)
        first = pipeline.image_condition(complete)["first_frame"]
        steps = list(pipeline.denoise(complete))
    assert all((step.latents[:, :, :1] == first).all() for step in steps)
    assert np.abs(steps[-1].latents[:, :, 1:]).max() > 0.1


def test_ti2v_makes_videos_of_text_alone(flow_of):
    with Pipeline.open(flow_of(TI2V.name).engines) as pipeline:
        complete = Request("x", size=(64, 64), frames=5, steps=2).completed(TI2V)
        *_, last = pipeline.denoise(complete)
        frames = list(pipeline.decode(last.latents))
    assert [chunk.shape for chunk in frames] == [(1, 3, 1, 64, 64), (1, 3, 4, 64, 64)]


def test_a_scale_of_all_experts_gives_way_to_that_of_one():
    complete = Request("x", guidance_scale=5.0, guidance={"low_noise": 2.0}).completed(T2V)
    assert complete.guidance == {"high_noise": 5.0, "low_noise": 2.0}
    with pytest.raises(UserError, match="guidance nan for high_noise"):
        Request("x", guidance_scale=float("nan")).completed(T2V)


def test_fixed_engines_give_size_and_frames_and_take_no_other(tiny_engines):
    fixed = (64, 48, 9)
    manifest = replace(open_bundle(tiny_engines, "engines").manifest, size=fixed)
    complete = fill_defaults(Request("x"), manifest)
    assert (complete.width, complete.height, complete.frames) == fixed
    for other in (Request("x", size=(48, 64)), Request("x", frames=5)):
        with pytest.raises(UserError, match="64x48, 9 frames, which the engines were built for"):
            fill_defaults(other, manifest)


def test_a_request_without_a_prompt_is_refused():
    with pytest.raises(UserError, match="no prompt"):
        Request().completed(T2V)
