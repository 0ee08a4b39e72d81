import numpy as np
import pytest

from runtime.schedule import Schedule, make_schedule
from runtime.solver import make_solver

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
SHAPE = (1, 4, 3, 6, 8)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def worst_difference(theirs, ours, steps):
    """The largest difference after any step, from the same noise with the same random velocities."""
    random = torch.Generator().manual_seed(steps)
    x = torch.randn(SHAPE, generator=random)
    y, worst = x.numpy(), 0.0
    theirs.set_begin_index(0)
    for t in theirs.timesteps:
        velocity = torch.randn(SHAPE, generator=random)
        x = theirs.step(velocity, t, x, return_dict=False)[0]
        y = ours.step(velocity.numpy(), y)
        worst = max(worst, float(np.abs(x.numpy() - y).max()))
    return worst


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 40])
@pytest.mark.parametrize("shift", [5.0, 12.0])
def test_unipc_equals_diffusers(steps, shift):
    theirs = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=shift)
    theirs.set_timesteps(steps)
    ours = make_solver("unipc", make_schedule("unipc", steps, shift, "diffusers"))
    assert worst_difference(theirs, ours, steps) <= 5e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 40])
def test_unipc_equals_diffusers_on_the_official_schedule(steps):
    schedule = make_schedule("unipc", steps, 12)
    theirs = diffusers.UniPCMultistepScheduler(**FLOW)
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.from_numpy(schedule.sigmas)
    assert worst_difference(theirs, make_solver("unipc", schedule), steps) <= 5e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 40])
@pytest.mark.parametrize("convention", ["official", "diffusers"])
def test_dpm_equals_diffusers(steps, convention):
    schedule = make_schedule("dpm++", steps, 5, convention)
    theirs = diffusers.DPMSolverMultistepScheduler(**FLOW)
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.from_numpy(schedule.sigmas)
    assert worst_difference(theirs, make_solver("dpm++", schedule), steps) <= 5e-6


@pytest.mark.parametrize("listed", [(1.0, 0.757, 0.522), (0.995, 0.934, 0.853, 0.609)])
def test_renoise_equals_the_stochastic_scheduler_of_diffusers_with_a_second_generator(listed):
    schedule = make_schedule("renoise", len(listed), 5, listed=listed)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    theirs.set_timesteps(sigmas=np.array(listed))
    theirs.set_begin_index(0)
    np.testing.assert_allclose(schedule.sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-7)
    start, second = (torch.Generator().manual_seed(seed) for seed in (7, 8))
    x = torch.randn(SHAPE, generator=start)
    y, ours = x.numpy(), make_solver("renoise", schedule, seed=7)
    for t in theirs.timesteps:
        velocity = torch.randn(SHAPE, generator=start)
        x = theirs.step(velocity, t, x, generator=second, return_dict=False)[0]
        y = ours.step(velocity.numpy(), y)
        np.testing.assert_allclose(y, x.numpy(), rtol=0, atol=2e-6)


def test_the_last_step_of_renoise_is_the_prediction_itself():
    schedule = make_schedule("renoise", 1, 5, listed=(0.5,))
    assert make_solver("renoise", schedule).step(np.float32([2, -4]), np.float32([1, 1])).tolist() == [0, 3]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_a_straight_path_ends_at_the_clean_latents(solver, steps):
    """A perfect model's velocity is constant, noise - clean; every solver is exact on it, even from sigma 1."""
    random = np.random.default_rng(0)
    noise, clean = random.standard_normal((2, *SHAPE), dtype=np.float32)
    schedule = make_schedule("dpm++", steps, 5)
    runner, latents = make_solver(solver, schedule), noise
    for _ in range(steps):
        latents = runner.step(noise - clean, latents)
    np.testing.assert_allclose(latents, clean, rtol=0, atol=2e-5)


def test_euler_is_one_multiplication_and_one_addition():
    schedule = Schedule(np.float32([1, 0.5, 0]), np.float32([1000, 500]))
    solver = make_solver("euler", schedule)
    first = solver.step(np.float32([2, -4]), np.float32([1, 1]))
    assert first.dtype == np.float32
    assert first.tolist() == [0, 3]
    assert solver.step(np.float32([1, 1]), first).tolist() == [-0.5, 2.5]


def test_a_step_with_equal_timesteps_still_moves_on():
    """The official code looks up the timestep and fails here (wan22.md §5.6)."""
    solver, latents = make_solver("unipc", make_schedule("unipc", 100, 12)), np.ones(SHAPE, np.float32)
    for _ in range(100):
        latents = solver.step(np.zeros(SHAPE, np.float32), latents)
    np.testing.assert_allclose(latents, 1, atol=1e-5)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "renoise"])
def test_no_step_changes_what_it_was_given_or_handed_out(solver):
    runner, random = make_solver(solver, make_schedule("unipc", 5, 5)), np.random.default_rng(1)
    seen = [random.standard_normal(SHAPE, dtype=np.float32)]
    kept = [seen[0].copy()]
    for _ in range(5):
        velocity = random.standard_normal(SHAPE, dtype=np.float32)
        before = velocity.copy()
        seen.append(runner.step(velocity, seen[-1]))
        kept.append(seen[-1].copy())
        np.testing.assert_array_equal(velocity, before)
    np.testing.assert_array_equal(seen, kept)


def test_more_steps_than_the_schedule_has_are_a_bug():
    solver = make_solver("unipc", make_schedule("unipc", 1, 5))
    latents = solver.step(np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32))
    with pytest.raises(IndexError):
        solver.step(np.zeros(SHAPE, np.float32), latents)
