"""Presets are the published schedules, and sampling settings travel in bundles."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from runtime.schedule import make_schedule
from wan22.errors import UserError
from wan22.sampling import ALIASES, PRESETS, SamplingSpec, preset_named, presets_for
from wan22.specs import I2V_A14B, SPECS, T2V_A14B, TI2V_5B


def run_of(spec, preset):
    """Timesteps and experts of a run with ``preset``."""
    sampled = spec.with_preset(preset)
    s = sampled.sampling
    timesteps = make_schedule(s.solver, s.steps, s.shift, s.schedule, s.sigmas).timesteps.tolist()
    return timesteps, [sampled.expert_at(t, step) for step, t in enumerate(timesteps)]


def bent(shift, grid):
    return [1000 * shift * u / (1 + (shift - 1) * u) for u in grid]


@pytest.mark.parametrize("spec", [T2V_A14B, I2V_A14B])
@pytest.mark.parametrize(
    ("preset", "shift", "published"),
    [
        ("lightx2v-4step", 5, [1000, 937.5, 833.3333, 625]),
        ("lightning", 5, [1000, 937.5, 833.3333, 625]),
        ("nvfp4-sparse-4step", 7, [1000, 954.5455, 875, 700]),
    ],
)
def test_four_step_presets_are_bent_quarters_with_two_steps_for_each_expert(spec, preset, shift, published):
    timesteps, experts = run_of(spec, preset)
    assert timesteps == pytest.approx(bent(shift, [1, 0.75, 0.5, 0.25]), rel=1e-6)
    assert timesteps == pytest.approx(published, rel=1e-6)
    assert experts == ["high_noise", "high_noise", "low_noise", "low_noise"]
    sampling = spec.with_preset(preset).sampling
    assert (sampling.solver, set(sampling.guidance.values())) == ("euler", {1.0})


def test_mlperf_is_the_scheduler_of_the_diffusers_repository():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(20)
    timesteps, experts = run_of(T2V_A14B, "mlperf")
    assert timesteps == scheduler.timesteps.tolist()
    assert timesteps[5:8] == [900, 875, 848]  # the seventh lies on the boundary, which belongs to the high-noise expert
    assert experts.count("high_noise") == sum(t >= 875 for t in timesteps) == 7
    assert T2V_A14B.with_preset("mlperf").sampling.guidance == {"high_noise": 4.0, "low_noise": 3.0}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_official_is_the_release_again_whatever_was_chosen_before(spec):
    assert all(spec.with_preset(name).with_preset("official") == spec for name in presets_for(spec.task))


def test_a_preset_keeps_the_boundary_and_the_video_of_its_checkpoint():
    stated = replace(T2V_A14B.sampling, boundary=0.8, frames=49, fps=24, shift=8.0)
    sampling = replace(T2V_A14B, sampling=stated).with_preset("mlperf").sampling
    assert (sampling.boundary, sampling.frames, sampling.fps, sampling.shift) == (0.8, 49, 24, 3.0)


@pytest.mark.parametrize(
    ("name", "task", "found"),
    [
        ("thunder", "t2v", "preset 'thunder' | expected one of official, "),
        ("mlperf", "i2v", "preset 'mlperf' for a i2v model"),
        ("lightning", "ti2v", "preset 'lightning' for a ti2v model | expected one of official, fastwan-3step |"),
    ],
)
def test_unknown_presets_and_those_of_other_models_are_refused(name, task, found):
    with pytest.raises(UserError) as error:
        preset_named(name, task)
    assert str(error.value).startswith(found)


def test_aliases_lead_to_presets():
    assert set(ALIASES.values()) <= set(PRESETS)
    assert preset_named("lightning", "t2v")[0] == "lightx2v-4step"


def test_settings_of_an_older_bundle_are_the_official_ones():
    young = ("solver", "schedule", "sigmas", "switch_step", "negative_prompt", "preset")
    stored = {k: v for k, v in msgspec.to_builtins(T2V_A14B.sampling).items() if k not in young}
    assert msgspec.convert(stored, SamplingSpec) == T2V_A14B.sampling


def test_fastwan_visits_its_three_timesteps_as_they_are():
    timesteps, experts = run_of(TI2V_5B, "fastwan-3step")
    assert timesteps == [1000, 757, 522]
    assert set(experts) == {"dit"}


def test_turbowan_bends_four_angles_and_switches_at_the_boundary():
    timesteps, experts = run_of(I2V_A14B, "turbowan-4step")
    angles = np.array([np.arctan(200), 1.5, 1.4, 1.0])
    assert timesteps == pytest.approx(1000 * np.sin(angles) / (np.sin(angles) + np.cos(angles)), rel=1e-6)
    assert timesteps == pytest.approx([995.02, 933.78, 852.90, 608.98], abs=5e-3)
    assert experts == ["high_noise", "high_noise", "low_noise", "low_noise"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_list_has_as_many_levels_as_steps_and_distilled_presets_have_no_guidance(name):
    for task in PRESETS[name].tasks:
        spec = next(spec for spec in SPECS.values() if spec.task == task)
        sampling = spec.with_preset(name).sampling
        assert len(sampling.sigmas) in (0, sampling.steps)
        assert set(sampling.guidance) == set(spec.experts)
        assert PRESETS[name].distilled == (set(sampling.guidance.values()) == {1.0})
