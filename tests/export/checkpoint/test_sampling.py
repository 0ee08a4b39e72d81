"""What a -Diffusers checkpoint says of sampling reaches the bundle, and contradictions are warned about once."""

import json
import logging
from dataclasses import replace

import pytest

from export.checkpoint.sampling import SCHEDULER_CONFIG, converter_shift, stated_sampling
from wan22.errors import UserError
from wan22.specs import I2V_A14B, T2V_A14B, TI2V_5B


@pytest.fixture
def stated(tmp_path):
    """``stated(spec, index, scheduler)`` → the sampling of a folder with those configs."""

    def made(spec, index, scheduler=None):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        if scheduler is not None:
            (tmp_path / SCHEDULER_CONFIG).parent.mkdir(exist_ok=True)
            (tmp_path / SCHEDULER_CONFIG).write_text(json.dumps(scheduler))
        return stated_sampling(tmp_path / "model_index.json", spec)

    return made


def test_a_boundary_is_taken_and_warned_about_once(stated, caplog):
    with caplog.at_level(logging.WARNING):
        assert stated(T2V_A14B, {"boundary_ratio": 0.8}) == replace(T2V_A14B.sampling, boundary=0.8)
        stated(T2V_A14B, {"boundary_ratio": 0.8})
    (message,) = caplog.messages
    assert "boundary 0.8 where t2v-a14b has 0.875" in message


@pytest.mark.parametrize("spec", [T2V_A14B, I2V_A14B, TI2V_5B])
def test_a_converted_release_says_nothing_new(stated, caplog, spec):
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": converter_shift(spec)}
    assert stated(spec, {"boundary_ratio": spec.sampling.boundary}, scheduler) == spec.sampling
    assert stated(spec, {}) == spec.sampling
    assert not caplog.messages


@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 8.0}, {"shift": 8.0}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}, {"solver": "euler", "shift": 5.0}),
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}, {"solver": "dpm++"}),
        ({"_class_name": "LCMScheduler"}, {}),
    ],
)
def test_the_scheduler_is_heard(stated, caplog, scheduler, changes):
    assert stated(T2V_A14B, {}, scheduler) == replace(T2V_A14B.sampling, **changes)
    assert len(caplog.messages) == max(1, len(changes))


@pytest.mark.parametrize(
    ("index", "scheduler", "found"),
    [
        ({"boundary_ratio": 875}, None, "boundary_ratio 875"),
        ({"boundary_ratio": -0.1}, None, "boundary_ratio -0.1"),
        ({"boundary_ratio": "high"}, None, "Expected `float | null`"),
        ({}, {"flow_shift": 0.0}, "shift 0"),
        ({}, {"flow_shift": [3]}, "Expected `float | null`"),
        ({}, {"num_train_timesteps": 500}, "num_train_timesteps 500"),
    ],
)
def test_what_cannot_be_meant_is_refused(stated, index, scheduler, found):
    with pytest.raises(UserError) as error:
        stated(T2V_A14B, index, scheduler)
    assert found in str(error.value)


def test_a_boundary_of_a_model_with_one_expert_is_ignored_aloud(stated, caplog):
    assert stated(TI2V_5B, {"boundary_ratio": 0.5}) == TI2V_5B.sampling
    assert "one expert" in caplog.text
