"""Step caches skip what their rule skips, estimate what their formula says, and replay exactly."""

import math
from dataclasses import replace

import numpy as np
import pytest

from runtime.denoise import Conditions, Sampler, denoise
from runtime.forward_inputs import time_features
from runtime.request import Request
from runtime.schedule import make_schedule
from runtime.solver import make_solver
from runtime.step_cache import EasyGate, Rounded, StepCache
from wan22.caching import Caching
from wan22.errors import UserError
from wan22.specs import SPECS

T2V = SPECS["t2v-a14b-tiny"]
SHAPE = (1, 16, 3, 4, 6)
TEXT = Conditions(np.full((1, 512, 8), 2, np.float32), np.full((1, 512, 8), -1, np.float32))
STEPS = 40
LARGE = (1, 16, 3, 36, 36)
SAMPLES = 2 / 9  # of the latents


class Model:
    """Forwards with a smooth velocity that depends on latents, time and text; they count their calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, *, latents, time_features, text, **_):
        self.calls.append((float(time_features[-1, 1]), float(text.flat[0])))
        scale = np.float32(0.3 + 0.2 * time_features[-1, 3])
        return scale * np.tanh(latents) + np.float32(0.01) * text.flat[0]


def run(caching=None, *, steps=STEPS, solver="unipc", guidance=3.0, shape=SHAPE):
    """The steps of a run and the model of each expert."""
    schedule = make_schedule(solver, steps, T2V.sampling.shift)
    models = {name: Model() for name in T2V.experts}
    experts = [T2V.expert_at(t) for t in schedule.timesteps.tolist()]
    scales = guidance if isinstance(guidance, dict) else dict.fromkeys(T2V.experts, guidance)
    unguided = [name for name, scale in scales.items() if scale == 1]
    cache = StepCache(caching, schedule.sigmas[:-1].tolist(), experts, unguided=unguided) if caching else None
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    sampler = Sampler(schedule, make_solver(solver, schedule), scales, cache)
    found, held = [], []
    for step in denoise(T2V, models, noise, TEXT, sampler):
        found.append(step)
        held.append(cache.held_bytes if cache else 0)
    return found, models, max(held)


def skipped(steps):
    return [step.index for step in steps if step.cached]


def mean_abs(x):
    return np.abs(x.astype(np.float64)).mean()


def paper(threshold, first, last, most, *, solver="unipc", guidance=3.0):
    """EasyCache written out from the paper's repository, both branches kept; the skipped steps and the latents."""
    schedule = make_schedule(solver, STEPS, T2V.sampling.shift)
    model, stepper = Model(), make_solver(solver, schedule)
    x = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    skips, error, k, in_a_row, x_before, expert = [], 0.0, None, 0, None, ""
    x_last = c_last = u_last = None
    for i, t in enumerate(schedule.timesteps.tolist()):
        if T2V.expert_at(t) != expert:
            expert, since, k, x_last = T2V.expert_at(t), i, None, None
        exact = i < first or i >= STEPS - last or i < since + 2 or in_a_row == most or k is None
        if not exact:
            error += k * mean_abs(x - x_before) / mean_abs(c_last)
        if not exact and error < threshold:
            skips.append(i)
            in_a_row += 1
            c, u = x + (c_last - x_last), x + (u_last - x_last)
        else:
            error, in_a_row = 0.0, 0
            c, u = (
                model(latents=x, time_features=time_features([t]), text=text) for text in (TEXT.positive, TEXT.negative)
            )
            if x_last is not None:
                k = mean_abs(c - c_last) / mean_abs(x - x_last)
            x_last, c_last, u_last = x, c, u
        x_before, x = x, stepper.step(u + np.float32(guidance) * (c - u), x)
    return skips, x


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize(("threshold", "first", "last", "most"), [(0.05, 10, 2, 2), (0.1, 7, 2, 1), (0.3, 5, 1, 4)])
def test_easy_is_the_rule_of_the_paper(solver, threshold, first, last, most):
    skips, latents = paper(threshold, first, last, most, solver=solver)
    steps, models, _ = run(Caching(True, threshold, first, last, most), solver=solver)
    assert skipped(steps) == skips
    assert skips
    np.testing.assert_allclose(steps[-1].latents, latents, atol=2e-5)
    assert sum(len(model.calls) for model in models.values()) == 2 * (STEPS - len(skips))


def test_nothing_passes_the_switch_and_both_ends_are_computed():
    steps, _, _ = run(Caching(easy=True, threshold=1e9, max_consecutive=99))
    assert skipped(steps) == [*range(10, 26), *range(28, 38)]  # 26 steps of the high-noise expert
    assert [math.isnan(step.cache_error) for step in steps] == [not step.cached for step in steps]
    assert all(step.seconds_engine == 0 for step in steps if step.cached)


@pytest.mark.parametrize("reuse", ["rescale", "hold", "taylor1"])
def test_a_recorded_list_repeats_the_run_exactly(reuse):
    caching = Caching(easy=True, threshold=0.08, reuse=reuse, late_cfg="auto")
    steps, _, _ = run(caching)
    lists = {"skip_steps": tuple(skipped(steps)), "late_cfg": tuple(s.index for s in steps if s.late_cfg)}
    assert all(lists.values())
    again, _, _ = run(Caching(reuse=reuse, **lists))
    assert {"skip_steps": tuple(skipped(again)), "late_cfg": tuple(s.index for s in again if s.late_cfg)} == lists
    assert all((a.latents == b.latents).all() for a, b in zip(steps, again, strict=True))


@pytest.mark.parametrize("reuse", ["rescale", "hold", "taylor1"])
def test_a_skipped_velocity_is_that_of_the_formula(reuse):
    """One Euler step, seen from outside: the velocity is the move over the gap of the sigmas."""
    steps, _, _ = run(Caching(skip_steps=(5,), reuse=reuse), solver="euler")
    sigmas = make_schedule("euler", STEPS, T2V.sampling.shift).sigmas.astype(np.float64)
    x = [None, *(step.latents.astype(np.float64) for step in steps)]  # x[i] before step i
    v = {i: (x[i + 1] - x[i]) / (sigmas[i + 1] - sigmas[i]) for i in (3, 4, 5)}
    expected = {
        "rescale": v[4] + x[5] - x[4],
        "hold": v[4],
        "taylor1": v[4] + (sigmas[5] - sigmas[4]) / (sigmas[4] - sigmas[3]) * (v[4] - v[3]),
    }[reuse]
    np.testing.assert_allclose(v[5], expected, atol=2e-3)  # of differences of float32 numbers, over gaps of 0.003


def test_the_three_estimates_differ():
    ends = [run(Caching(skip_steps=(20, 21, 30), reuse=r))[0][-1].latents for r in ("rescale", "hold", "taylor1")]
    assert min(np.abs(a - b).max() for a, b in zip(ends, [*ends[1:], ends[0]], strict=True)) > 1e-4


def test_taylor_is_exact_for_a_velocity_that_is_linear_in_sigma():
    cache = StepCache(Caching(skip_steps=(3,), reuse="taylor1"), [0.9, 0.8, 0.65, 0.4, 0.1], ["dit"] * 5)
    at = {sigma: np.full((1, 1, 2, 1, 1), 3 - 2 * sigma, np.float32) for sigma in (0.9, 0.8, 0.65)}
    for step, velocity in enumerate(at.values()):
        assert not cache.skips(step)
        cache.observe(step, velocity, velocity, velocity)
    assert cache.skips(3)
    np.testing.assert_allclose(cache.estimate(3, at[0.9]), 3 - 2 * 0.4, rtol=1e-6)


def test_without_a_cache_nothing_changes():
    """The bytes are those of the loop written out."""
    schedule = make_schedule("unipc", 4, T2V.sampling.shift)
    model, stepper = Model(), make_solver("unipc", schedule)
    x = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    for t in schedule.timesteps.tolist():
        c, u = (
            model(latents=x, time_features=time_features([t]), text=text) for text in (TEXT.positive, TEXT.negative)
        )
        velocity = c - u
        velocity *= np.float32(3)
        velocity += u
        x = stepper.step(velocity, x)
    steps, _, held = run(steps=4)
    assert (steps[-1].latents == x).all()
    assert held == 0
    assert not any(step.cached or step.late_cfg for step in steps)


EASY, LISTED, LATE = Caching(easy=True), Caching(skip_steps=(5, 30)), Caching(late_cfg="auto")


@pytest.mark.parametrize(
    ("caching", "latents"),
    [
        (EASY, 1 + SAMPLES),
        (replace(EASY, reuse="hold"), 1 + SAMPLES),
        (replace(EASY, reuse="taylor1"), 1.5 + SAMPLES),
        (replace(EASY, late_cfg="auto"), 2 + SAMPLES),
        (replace(EASY, reuse="hold", late_cfg="auto"), 2 + SAMPLES),
        (replace(EASY, reuse="taylor1", late_cfg="auto"), 2.5 + SAMPLES),
        (LISTED, 1),
        (replace(LISTED, reuse="hold"), 1),
        (replace(LISTED, reuse="taylor1"), 1.5),
        (replace(LISTED, late_cfg="auto"), 2),
        (replace(LISTED, reuse="hold", late_cfg="auto"), 2),
        (replace(LISTED, reuse="taylor1", late_cfg="auto"), 2.5),
        (LATE, 1),
    ],
)
def test_a_cache_keeps_at_most_three_latents(caching, latents):
    _, _, held = run(caching, shape=LARGE)
    assert held == latents * 4 * math.prod(LARGE)
    assert latents <= 3


@pytest.mark.parametrize("reuse", ["rescale", "hold", "taylor1"])
@pytest.mark.parametrize("late_cfg", [None, "auto"])
@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 2), (1, 16, 2, 2, 4), (1, 16, 2, 8, 8), SHAPE])
def test_no_cache_keeps_more_than_three_of_small_latents(reuse, late_cfg, shape):
    steps, _, held = run(Caching(easy=True, threshold=0.3, reuse=reuse, late_cfg=late_cfg), shape=shape)
    assert held <= 3 * 4 * math.prod(shape)
    assert skipped(steps)


@pytest.mark.parametrize("caching", [replace(LISTED, reuse="taylor1"), replace(LISTED, late_cfg=(12, 32)), LATE])
def test_16_bits_for_what_is_extrapolated_do_not_show(caching, monkeypatch):
    kept = run(caching)[0][-1].latents
    monkeypatch.setattr("runtime.step_cache.Rounded", InFull)
    full = run(caching)[0][-1].latents
    assert (kept != full).any()
    assert mean_abs(kept - full) < 1e-5 * mean_abs(full)  # float32 itself has 6e-8; the skipped steps change 1e-2


class InFull:
    """In the place of ``Rounded``: nothing is lost."""

    def __init__(self, values):
        self.integers = values

    def __call__(self):
        return self.integers.copy()


def test_values_of_any_size_fit_into_16_bits():
    for largest in (1e-12, 1.0, 1e30):
        values = np.linspace(-largest, largest, 1001, dtype=np.float32).reshape(1, 1, 1, 7, 143)
        np.testing.assert_allclose(Rounded(values.copy())(), values, atol=1.6e-5 * largest)
    assert not Rounded(np.zeros((1, 1, 1, 2, 2), np.float32))().any()


def test_easy_decides_from_a_ninth_of_large_latents_as_from_all(monkeypatch):
    sampled, _, _ = run(Caching(easy=True, threshold=0.1), shape=LARGE)
    monkeypatch.setattr("runtime.step_cache.SAMPLED_FROM", math.inf)
    whole, _, held = run(Caching(easy=True, threshold=0.1), shape=LARGE)
    assert held == 3 * 4 * math.prod(LARGE)
    assert skipped(sampled) == skipped(whole) != []
    sums = [[step.cache_error for step in steps] for steps in (sampled, whole)]
    np.testing.assert_allclose(*sums, rtol=0.03)
    assert sums[0] != sums[1]


def test_late_cfg_saves_every_second_unconditional_forward_at_the_end():
    steps, models, _ = run(Caching(late_cfg="auto"))
    late = [step.index for step in steps if step.late_cfg]
    assert late == [16, 18, 20, 22, 24, 28, 30, 32, 34, 36]
    conditional = [text for model in models.values() for _, text in model.calls if text == 2]
    unconditional = [text for model in models.values() for _, text in model.calls if text == -1]
    assert (len(conditional), len(unconditional)) == (STEPS, STEPS - len(late))


@pytest.mark.parametrize(
    ("unguided", "expected"), [("high_noise", [28, 30, 32, 34, 36]), ("low_noise", [16, 18, 20, 22, 24])]
)
def test_late_cfg_leaves_out_the_steps_of_an_expert_without_guidance(unguided, expected):
    request = Request("x", steps=STEPS, guidance={unguided: 1}, cache=Caching(late_cfg="auto")).completed(T2V)
    cache = request.sampler(T2V).cache
    assert cache is not None
    steps, models, held = run(Caching(late_cfg="auto"), guidance=request.guidance)
    assert [step.index for step in steps if step.late_cfg] == expected
    assert {text for _, text in models[unguided].calls} == {2}
    assert held <= 2 * 4 * math.prod(SHAPE)
    x = np.ones(SHAPE, np.float32)
    offered = []
    for step in range(STEPS):  # the request's own cache
        if cache.residual(step) is not None:
            offered.append(step)
        cache.observe(step, x, x, x)
    assert offered == expected


def test_a_late_residual_is_extrapolated_in_sigma():
    sigmas = [0.9, 0.8, 0.65, 0.4, 0.3]
    cache = StepCache(Caching(late_cfg=(2, 3, 4)), sigmas, ["dit"] * 5)
    conditional = np.ones((1, 1, 1, 1, 1), np.float32)
    for step in (0, 1):
        assert cache.residual(step) is None
        cache.observe(step, conditional, conditional, conditional * np.float32(1 + 5 * sigmas[step]))
    near = cache.residual(2)  # 1.5 gaps away
    np.testing.assert_allclose(near, 5 * 0.65, rtol=1e-5)
    cache.observe(2, conditional, conditional, conditional + near)
    assert cache.residual(3) is None  # 4 gaps away: computed instead


@pytest.mark.parametrize("clean_first_frame", [False, True])
def test_an_image_that_never_changes_is_not_measured(clean_first_frame):
    gate = EasyGate(Caching(easy=True, first_exact=2), ["dit"] * 12, clean_first_frame=clean_first_frame)
    still = np.zeros((1, 1, 4, 1, 1), np.float32)
    moving = still.copy()
    moving[:, :, 1:] = 1
    gate.skips(0)
    gate.observe(still, still)
    gate.skips(1)
    gate.observe(moving, still + 2)
    moved = 1 if clean_first_frame else 0.75
    assert gate.gain == pytest.approx(2 / moved)
    gate.moved(still, moving)
    gate.skips(2)
    assert gate.error == pytest.approx(2 / moved * moved / 2)


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (Request("x", steps=4, cache=Caching(easy=True)), "a step cache with 4 steps"),
        (Request("x", preset="lightning", cache=Caching(easy=True)), "a step cache with lightx2v-4step"),
        (
            Request("x", preset="lightning", steps=40, cache=Caching(skip_steps=(5,))),
            "a step cache with lightx2v-4step",
        ),
        (Request("x", steps=40, guidance_scale=1, cache=Caching(late_cfg="auto")), "late cfg without guidance"),
        (
            Request("x", steps=40, cache=Caching(skip_steps=(26,))),
            "skip step 26 | expected none of steps 0, 1, 26, 27: ",
        ),
        (Request("x", steps=40, guidance={"high_noise": 1}, cache=Caching(late_cfg=(4,))), "late-cfg step 4 |"),
        (Request("x", steps=40, cache=Caching(easy=True, reuse="best")), "reuse 'best' | expected one of rescale, "),
        (Request("x", steps=40, cache=Caching(skip_steps="11,12")), "skip steps '11,12' | expected numbers of steps"),
        (
            Request("x", steps=40, cache=Caching(late_cfg="all")),
            "late cfg 'all' | expected numbers of steps, or",
        ),
        (
            Request("x", steps=40, cache=Caching(skip_steps="magcache", late_cfg=(12, 13))),
            "skip and late-cfg step 12 |",
        ),
    ],
)
def test_requests_whose_cache_cannot_work_are_refused(request_, found):
    with pytest.raises(UserError) as error:
        request_.completed(T2V)
    assert str(error.value).startswith(found)


def test_a_distilled_bundle_takes_no_cache_even_with_many_steps():
    with pytest.raises(UserError, match="a step cache with lightx2v-4step"):
        Request("x", steps=40, cache=Caching(easy=True)).completed(T2V.with_preset("lightning"))


def test_magcache_becomes_a_list_and_an_empty_cache_none():
    complete = Request("x", steps=40, cache=Caching(skip_steps="magcache")).completed(T2V)
    assert complete.cache is not None
    assert complete.cache.skip_steps[:3] == (11, 12, 14)
    assert Request("x", cache=Caching()).completed(T2V).cache is None
