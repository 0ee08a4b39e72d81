import numpy as np
import pytest

from runtime.schedule import make_schedule
from wan22.errors import UserError
from wan22.specs import SPECS

# wan22.md §5.2, recorded from the official samplers
T2V_40 = """999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898 888 877
    865 852 837 819 799 776 749 717 678 631 571 492 386 235"""
I2V_40 = """999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818 803 786 768 749
    728 706 681 654 624 591 555 514 468 416 356 288 208 113"""
TI2V_50 = """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843 833
    821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92"""

# wan22.md §5.3: high-noise steps as official UniPC / diffusers UniPC / Lightning, by steps, for shift 3, 5, 8, 12
HIGH_NOISE_STEPS = {
    "t2v-a14b": {
        4: ["2/2/2", "2/2/2", "3/3/3", "3/3/3"],
        8: ["3/3/3", "4/4/4", "5/5/5", "6/6/6"],
        20: ["6/7/6", "9/9/9", "11/11/11", "13/13/13"],
        30: ["9/10/9", "13/13/13", "16/17/17", "19/19/19"],
        40: ["12/13/12", "17/17/17", "22/22/22", "26/26/26"],
        50: ["15/16/15", "21/21/21", "27/27/27", "32/32/32"],
    },
    "i2v-a14b": {
        4: ["1/2/2", "2/2/2", "2/2/2", "3/3/3"],
        8: ["2/3/3", "3/3/3", "4/4/4", "5/5/5"],
        20: ["5/6/6", "8/8/8", "10/10/10", "12/12/12"],
        30: ["8/8/8", "11/11/11", "15/15/15", "18/18/18"],
        40: ["10/11/11", "15/15/15", "19/19/19", "23/23/23"],
        50: ["13/13/13", "18/18/18", "24/24/24", "29/29/29"],
    },
}


def high_noise_steps(model, solver, steps, shift, convention="official"):
    timesteps = make_schedule(solver, steps, shift, convention).timesteps
    return sum(SPECS[model].expert_at(t) == "high_noise" for t in timesteps)


@pytest.mark.parametrize(("steps", "shift", "expected"), [(40, 12, T2V_40), (40, 5, I2V_40), (50, 5, TI2V_50)])
def test_official_timesteps_of_the_three_models(steps, shift, expected):
    schedule = make_schedule("unipc", steps, shift)
    assert schedule.timesteps.tolist() == [int(t) for t in expected.split()]


def test_official_sigmas_of_t2v():
    sigmas = make_schedule("unipc", 40, 12).sigmas
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas[:3], [0.999917, 0.997783, 0.995546], atol=6e-7)
    np.testing.assert_allclose(sigmas[-3:], [0.386847, 0.235110, 0], atol=6e-7)


def test_lightning_steps_are_exact_and_fractional():
    schedule = make_schedule("euler", 4, 5)
    np.testing.assert_array_equal(schedule.timesteps, np.float32([1000, 937.5, 2500 / 3, 625]))
    np.testing.assert_array_equal(schedule.sigmas, np.float32([1, 0.9375, 2.5 / 3, 0.625, 0]))


def test_official_dpm_starts_at_pure_noise():
    schedule = make_schedule("dpm++", 8, 5)
    assert (schedule.sigmas[0], schedule.timesteps[0]) == (1, 1000)
    assert (schedule.timesteps == np.trunc(schedule.timesteps)).all()


@pytest.mark.parametrize(("model", "shift", "high"), [("t2v-a14b", 12, 26), ("i2v-a14b", 5, 15)])
def test_default_expert_split(model, shift, high):
    assert high_noise_steps(model, "unipc", 40, shift) == high


@pytest.mark.parametrize("model", HIGH_NOISE_STEPS)
@pytest.mark.parametrize("steps", [4, 8, 20, 30, 40, 50])
def test_high_noise_steps_of_every_combination(model, steps):
    rows = []
    for shift in (3, 5, 8, 12):
        counts = [high_noise_steps(model, "unipc", steps, shift, c) for c in ("official", "diffusers")]
        rows.append("/".join(map(str, [*counts, high_noise_steps(model, "euler", steps, shift)])))
    assert rows == HIGH_NOISE_STEPS[model][steps]


def test_two_steps_may_share_a_timestep():
    schedule = make_schedule("unipc", 100, 12)
    assert schedule.timesteps[:2].tolist() == [999, 999]
    assert schedule.steps == 100


@pytest.mark.parametrize("steps", [1001, 2_000_000_000])
def test_more_steps_than_there_are_timesteps_are_refused_before_a_list_is_made(steps):
    with pytest.raises(UserError, match=rf"{steps} steps \| expected at most 1000"):
        make_schedule("unipc", steps, 5.0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 37, 40, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_diffusers_convention_equals_its_schedulers(solver, steps, shift):
    diffusers = pytest.importorskip("diffusers")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    theirs = {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    }[solver]()
    theirs.set_timesteps(steps)
    ours = make_schedule(solver, steps, shift, "diffusers")
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-6)
    tolerance = 1e-3 if solver == "euler" else 0
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_a_list_is_taken_as_the_diffusers_schedulers_take_it(solver):
    diffusers = pytest.importorskip("diffusers")
    listed = [np.sin(a) / (np.sin(a) + np.cos(a)) for a in (np.arctan(200), 1.5, 1.4, 1.0)]  # TurboWan's
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    theirs = {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    }[solver]()
    theirs.set_timesteps(sigmas=np.array(listed))
    ours = make_schedule(solver, 4, 5.0, listed=listed)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=0, atol=1e-3)
    assert np.trunc(ours.timesteps).tolist() == [995, 933, 852, 608]


@pytest.mark.parametrize("listed", [(0.5, 0.5), (0.5, 0.9), (1.1, 0.5), (0.5, 0.0), (float("nan"), 0.5), (0.5, -0.1)])
def test_a_list_that_does_not_fall_is_refused(listed):
    with pytest.raises(UserError, match="noise levels"):
        make_schedule("euler", 2, 5.0, listed=listed)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("unipc", 0, 5.0), "0 steps"),
        (("unipc", -3, 5.0), "-3 steps"),
        (("unipc", 40, 0.0), "shift 0"),
        (("euler", 40, -1.0), "shift -1"),
        (("dpm++", 40, float("nan")), "shift nan"),
        (("unipc", 40, float("inf")), "shift inf"),
        (("heun", 40, 5.0), "solver 'heun'"),
        (("unipc", 40, 5.0, "karras"), "schedule 'karras'"),
        (("unipc", 40, 1e9), "40 steps with shift 1e+09"),
    ],
)
def test_refuses_what_makes_no_sense(arguments, found):
    with pytest.raises(UserError) as error:
        make_schedule(*arguments)
    assert error.value.found.startswith(found)
