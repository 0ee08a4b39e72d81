import time
from dataclasses import replace

import numpy as np
import pytest

from runtime.denoise import Conditions, Sampler, denoise
from runtime.forward_inputs import rope_tables, time_features
from runtime.schedule import make_schedule
from runtime.solver import make_solver
from wan22.errors import NonFiniteError, UserError
from wan22.specs import SPECS

T2V, TI2V = SPECS["t2v-a14b-tiny"], SPECS["ti2v-5b-tiny"]
SHAPE = (1, 16, 5, 4, 6)
POSITIVE, NEGATIVE = np.full((1, 512, 8), 2, np.float32), np.full((1, 512, 8), -1, np.float32)
TEXT = Conditions(POSITIVE, NEGATIVE)


class Recorder:
    """A forward that remembers its inputs; every element of the velocity is the text's value."""

    def __init__(self):
        self.calls = []

    def __call__(self, **inputs):
        self.calls.append(inputs)
        return np.full_like(inputs["latents"], inputs["text"].flat[0])


def run(spec=T2V, experts=None, *, given=TEXT, guidance=3.0, solver="euler", steps=4, shape=SHAPE):
    schedule = make_schedule(solver, steps, spec.sampling.shift)
    experts = experts or dict.fromkeys(spec.experts, Recorder())
    scales = guidance if isinstance(guidance, dict) else dict.fromkeys(spec.experts, guidance)
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return noise, denoise(spec, experts, noise, given, Sampler(schedule, make_solver(solver, schedule), scales))


def test_yields_after_every_step_and_ends_where_the_solver_does():
    noise, steps = run(guidance=1.0)
    steps = list(steps)
    assert [(s.index, s.total) for s in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    np.testing.assert_allclose(steps[-1].latents, noise - 2, atol=1e-5)  # sigma falls by 1 at velocity 2


def test_guidance_moves_from_the_unconditional_velocity_through_the_conditional():
    noise, steps = run(guidance=3.0)
    np.testing.assert_allclose(list(steps)[-1].latents, noise - (-1 + 3 * (2 - -1)), atol=1e-5)


def test_guidance_1_runs_no_unconditional_forward():
    forward = Recorder()
    _, steps = run(experts=dict.fromkeys(T2V.experts, forward), given=Conditions(POSITIVE), guidance=1.0)
    assert len(list(steps)) == len(forward.calls) == 4


def test_each_expert_works_at_its_timesteps_with_its_guidance():
    experts = {name: Recorder() for name in T2V.experts}
    _, steps = run(experts=experts, guidance={"high_noise": 1.0, "low_noise": 2.0}, solver="unipc", steps=40)
    assert [s.expert for s in steps] == ["high_noise"] * 26 + ["low_noise"] * 14
    assert (len(experts["high_noise"].calls), len(experts["low_noise"].calls)) == (26, 28)


def test_an_expert_is_opened_once_and_only_when_its_turn_comes():
    opened = []

    def open_expert(name):
        opened.append(name)
        return Recorder()

    _, steps = run(experts=open_expert, solver="unipc", steps=40)
    for step in steps:
        assert opened == (["high_noise"] if step.index < 26 else ["high_noise", "low_noise"])


def test_a_forward_sees_tables_and_time_of_its_latents():
    forward = Recorder()
    _, steps = run(experts=dict.fromkeys(T2V.experts, forward), given=Conditions(POSITIVE), guidance=1.0)
    step = next(steps)
    inputs = forward.calls[0]
    assert set(inputs) == {"latents", "time_features", "text", "rope_cos", "rope_sin"}
    np.testing.assert_array_equal(inputs["time_features"], time_features([step.timestep]))
    np.testing.assert_array_equal(inputs["rope_sin"], rope_tables(T2V.dit.head_width, 5, 2, 3)[1])


def test_the_condition_reaches_every_forward():
    forward, condition = Recorder(), np.ones((1, 20, *SHAPE[2:]), np.float32)
    spec = SPECS["i2v-a14b-tiny"]
    given = Conditions(POSITIVE, NEGATIVE, condition=condition)
    _, steps = run(spec, dict.fromkeys(spec.experts, forward), given=given)
    assert len(list(steps)) == 4
    assert [call["condition"] is condition for call in forward.calls] == [True] * 8


def test_ti2v_from_text_has_two_equal_rows_of_time():
    forward = Recorder()
    _, steps = run(TI2V, {"dit": forward}, shape=(1, 48, 5, 4, 6))
    step = next(steps)
    np.testing.assert_array_equal(forward.calls[0]["time_features"], time_features([step.timestep] * 2))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_ti2v_from_an_image_keeps_the_first_frame_clean(solver):
    forward, frame = Recorder(), np.full((1, 48, 1, 4, 6), 7, np.float32)
    given = Conditions(POSITIVE, NEGATIVE, first_frame=frame)
    noise, steps = run(TI2V, {"dit": forward}, given=given, shape=(1, 48, 5, 4, 6), solver=solver)
    text_noise, text_steps = run(TI2V, shape=(1, 48, 5, 4, 6), solver=solver)
    kept = text_noise.copy()
    for step, text_step in zip(steps, text_steps, strict=True):
        np.testing.assert_array_equal(step.latents[:, :, :1], frame)
        np.testing.assert_array_equal(step.latents[:, :, 1:], text_step.latents[:, :, 1:])
        np.testing.assert_array_equal(forward.calls[-1]["time_features"], time_features([0, step.timestep]))
    assert all((call["latents"][:, :, :1] == frame).all() for call in forward.calls)
    np.testing.assert_array_equal(noise, kept)


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("positive", "embeddings of the prompt"),
        ("negative", "embeddings of the negative prompt"),
        ("condition", "encoded image"),
        ("first_frame", "encoded image"),
    ],
)
def test_a_condition_that_is_not_finite_is_named_before_the_first_step(field, named):
    with pytest.raises(NonFiniteError, match=f"^{named}: 1 of 8 values are NaN"):
        run(given=replace(TEXT, **{field: np.float32([0, 1, 2, np.nan, 4, 5, 6, 7])}))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_velocity_that_is_not_finite_stops_the_run_and_says_where(bad):
    forward = Recorder()

    def breaks(**inputs):
        velocity = forward(**inputs)
        if len(forward.calls) == 3:
            velocity[0, 3, 1, 2, 2] = bad
        return velocity

    _, steps = run(experts=dict.fromkeys(T2V.experts, breaks))
    next(steps)
    with pytest.raises(NonFiniteError, match=r"high_noise in step 2 of 4 \(t = 972.*1 of 1920 values"):
        next(steps)


def test_latents_handed_out_stay_as_they_were():
    _, steps = run(solver="unipc", steps=6)
    seen = [(step.latents, step.latents.copy()) for step in steps]
    assert all((now == then).all() for now, then in seen)


def test_guidance_must_be_a_number():
    with pytest.raises(UserError, match="guidance nan for low_noise"):
        run(guidance={"high_noise": 1.0, "low_noise": float("nan")})


def test_guidance_without_a_negative_prompt_is_a_bug_seen_at_once():
    with pytest.raises(ValueError, match="negative"):
        run(given=Conditions(POSITIVE))


def test_a_stopped_run_can_be_left():
    forward = Recorder()
    _, steps = run(experts=dict.fromkeys(T2V.experts, forward))
    next(steps)
    steps.close()
    assert len(forward.calls) == 2


def test_seconds_in_the_engine_are_told_from_those_around_it():
    def slow(**inputs):
        time.sleep(0.02)
        return inputs["latents"]

    _, steps = run(experts=dict.fromkeys(T2V.experts, slow), steps=2)
    for step in steps:
        assert 0.04 <= step.seconds_engine <= step.seconds_total


def test_the_sampler_around_a_tiny_step_takes_five_milliseconds_at_most():
    """A step of the tiny model takes about 0.1 s on a laptop: this is 5 % of it."""
    _, steps = run(solver="unipc", steps=8, shape=T2V.latent_shape(256, 160, 17))
    overhead = sorted(step.seconds_total - step.seconds_engine for step in steps)
    assert overhead[4] < 5e-3
