"""The skip lists are those that follow from the published rule and tables."""

from dataclasses import replace

import pytest

from runtime import magcache
from runtime.magcache import magcache_steps
from runtime.schedule import make_schedule
from wan22.errors import UserError
from wan22.specs import I2V_A14B, SPECS, T2V_A14B, TI2V_5B

T2V_RECIPE = (11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 32, 34, 36)
TI2V_TEXT = (10, 11, 13, 14, 16, 17, 19, 20, 22, 23, 25, 26, 28, 29, 31, 32, 34, 35, 37, 39, 41, 43, 45, 47)


def steps_of(spec, steps=None, *, has_image=False):
    schedule = make_schedule("unipc", steps or spec.sampling.steps, spec.sampling.shift)
    return magcache_steps(spec, schedule, has_image=has_image)


@pytest.mark.parametrize(
    ("spec", "has_image", "published"),
    [
        (T2V_A14B, False, T2V_RECIPE),
        (I2V_A14B, True, (18, 19, 21, 22, 24, 25, 27, 29, 31, 33)),
        (TI2V_5B, False, TI2V_TEXT),  # the rule skips the last step too, which no cache does here
        (TI2V_5B, True, TI2V_TEXT[:-1]),
    ],
)
def test_the_recipes_give_the_published_lists(spec, has_image, published):
    assert steps_of(spec, has_image=has_image) == published


def test_the_default_parameters_give_the_published_list(monkeypatch):
    monkeypatch.setattr(magcache, "_T2V", replace(magcache._T2V, threshold=0.04, retention=(0.2, 0.2)))
    high = (6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25)
    assert steps_of(T2V_A14B) == (*high, 30, 32, 34)


@pytest.mark.parametrize("steps", [12, 20, 30, 60])
def test_other_numbers_of_steps_skip_fewer_where_steps_are_wider(steps):
    share = len(steps_of(T2V_A14B, steps)) / steps
    assert share < 0.5
    assert (share < 13 / 40) == (steps < 40)


def test_a_twin_takes_the_table_of_its_original_and_a_stranger_none():
    assert steps_of(SPECS["t2v-a14b-small"]) == T2V_RECIPE
    with pytest.raises(UserError, match="magcache for t2v-a14b-custom"):
        steps_of(replace(T2V_A14B, name="t2v-a14b-custom"))
    with pytest.raises(UserError, match="magcache for other"):
        steps_of(replace(T2V_A14B, name="other"))
