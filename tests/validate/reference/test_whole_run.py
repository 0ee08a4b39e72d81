"""The reference's schedules are the published ones, and its loop accepts all their timesteps."""

import numpy as np
import pytest
import torch

from runtime.request import Request
from validate import ValidateOptions, validate
from validate.reference.reference import NO_IMAGE, ImageInputs
from validate.reference.whole_run import initial_noise, run, sigmas_and_timesteps
from wan22.specs import SPECS, T2V_A14B

# wan22.md §5.2, from the official code
OFFICIAL_40_12 = (
    "999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898 888 877 "
    "865 852 837 819 799 776 749 717 678 631 571 492 386 235"
)
OFFICIAL_40_5 = (
    "999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818 803 786 768 749 728 706 "
    "681 654 624 591 555 514 468 416 356 288 208 113"
)
TINY = SPECS["t2v-a14b-tiny"]


def request(**options):
    return Request("a fox", size=(32, 32), frames=1, **options).completed(TINY)


@pytest.mark.parametrize(("shift", "expected"), [(12.0, OFFICIAL_40_12), (5.0, OFFICIAL_40_5)])
def test_official_unipc(shift, expected):
    sigmas, timesteps = sigmas_and_timesteps(request(steps=40, shift=shift))
    assert timesteps.tolist() == [int(t) for t in expected.split()]
    assert len(sigmas) == 41
    assert sigmas[-1] == 0
    if shift == 12:
        np.testing.assert_allclose(sigmas[[0, 1, 2, -3, -2]], [0.999917, 0.997783, 0.995546, 0.386847, 0.23511], 2e-6)


def test_official_euler_is_that_of_lightning():
    _, timesteps = sigmas_and_timesteps(request(steps=4, shift=5.0, solver="euler"))
    np.testing.assert_allclose(timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-6)


def test_official_dpm_starts_at_pure_noise():
    sigmas, timesteps = sigmas_and_timesteps(request(steps=4, shift=5.0, solver="dpm++"))
    assert sigmas[0] == 1
    assert timesteps.tolist() == [1000, 937, 833, 625]


def test_unmodified_diffusers_unipc():
    sigmas, timesteps = sigmas_and_timesteps(request(steps=4, shift=5.0, schedule="diffusers"))
    assert timesteps[0] == 999
    assert sigmas[0] == np.float32(1 - 1e-6)


def test_noise_is_that_of_a_cpu_generator():
    expected = torch.randn(1, 16, 1, 6, 8, generator=torch.Generator("cpu").manual_seed(7)).numpy()
    complete = Request("x", size=(64, 48), frames=1, seed=7).completed(SPECS["t2v-a14b-tiny"])
    assert np.array_equal(initial_noise(complete), expected)


def test_noise_that_is_given_is_taken():
    given = np.ones((16, 1, 6, 8), np.float32)
    complete = Request("x", size=(64, 48), frames=1, noise=given).completed(SPECS["t2v-a14b-tiny"])
    assert np.array_equal(initial_noise(complete)[0], given)


class Toward:
    """A model whose velocities lead straight from the noise to ``goal``."""

    def __init__(self, spec, goal):
        self.spec, self.boundary, self.goal, self.asked = spec, spec.sampling.boundary, goal, []

    def velocity(self, expert, latents, timestep, text, given=NO_IMAGE):
        self.asked.append((expert, timestep, float(text[0])))
        sigma = self.sigmas[timestep] if isinstance(self.sigmas, dict) else self.sigmas
        return (latents - self.goal) / np.float32(sigma)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "renoise"])
@pytest.mark.parametrize("schedule", ["official", "diffusers"])
def test_every_solver_arrives(solver, schedule):
    asked = request(steps=6, shift=5.0, solver=solver, schedule=schedule, guidance=dict.fromkeys(TINY.experts, 1.0))
    model = Toward(TINY, np.full(asked.latent_shape, 0.25, np.float32))
    sigmas, timesteps = sigmas_and_timesteps(asked)
    model.sigmas = dict(zip(timesteps.tolist(), sigmas.tolist(), strict=False))
    steps = list(run(model, asked, np.ones(1), None))
    assert [step.index for step in steps] == list(range(6))
    np.testing.assert_allclose(steps[-1].after, model.goal, atol=1e-4)
    assert all(text == 1 for _, _, text in model.asked)


def test_guidance_and_experts_change_at_the_boundary():
    asked = request(steps=8, shift=12.0, guidance={"high_noise": 4.0, "low_noise": 1.0})
    model = Toward(TINY, np.float32(0))
    model.sigmas = 1.0
    steps = list(run(model, asked, np.ones(1), np.zeros(1)))
    assert [step.expert for step in steps] == ["high_noise"] * 6 + ["low_noise"] * 2
    assert len(model.asked) == 6 * 2 + 2


def test_two_steps_of_one_timestep_do_not_stop_the_run():
    asked = request(steps=100, shift=12.0, guidance=dict.fromkeys(TINY.experts, 1.0))
    _, timesteps = sigmas_and_timesteps(asked)
    assert timesteps[0] == timesteps[1] == 999  # the official code dies here (wan22.md §5.6)
    model = Toward(T2V_A14B, np.float32(0))
    model.sigmas = 1.0
    assert len(list(run(model, asked, np.ones(1), None))) == 100


def test_a_clean_first_frame_stays_through_the_run():
    asked = request(steps=5, shift=5.0, guidance=dict.fromkeys(TINY.experts, 1.0))
    frame = np.full((*asked.latent_shape[:2], 1, *asked.latent_shape[3:]), 7, np.float32)
    model = Toward(TINY, np.float32(0))
    model.sigmas = 1.0
    for step in run(model, asked, np.ones(1), None, ImageInputs(first_frame=frame)):
        assert np.array_equal(step.before[:, :, :1], frame)
        assert np.array_equal(step.after[:, :, :1], frame)


def test_the_noise_of_renoise_is_that_of_a_second_generator(flow_of, tmp_path):
    """Engines and reference draw the noise independently; the runs agree only if every draw is equal."""
    flow = flow_of("ti2v-5b-tiny")
    options = ValidateOptions(Request(size=(64, 64), frames=1, preset="fastwan-3step", seed=2**64 - 1))
    report = validate(flow.engines, flow.checkpoint, tmp_path, options)
    assert [row.name for row in report.failed] == []
    assert [row.timestep for row in report.steps] == [1000, 757, 522]
