"""Step caches that cannot work are refused with a reason."""

import math

import pytest

from wan22.caching import Caching, computed_steps, parse_steps
from wan22.errors import UserError

EXPERTS = ["high_noise"] * 6 + ["low_noise"] * 14


def test_every_expert_computes_its_first_two_steps_and_the_run_its_last():
    assert computed_steps(EXPERTS) == {0, 1, 6, 7, 19}


@pytest.mark.parametrize(
    ("caching", "found"),
    [
        (Caching(easy=True, threshold=0), "cache threshold 0 "),
        (Caching(easy=True, threshold=math.nan), "cache threshold nan"),
        (Caching(easy=True, first_exact=1), "first exact 1 | expected at least 2"),
        (Caching(easy=True, last_exact=0), "last exact 0 | expected at least 1"),
        (Caching(easy=True, max_consecutive=0), "max consecutive 0"),
        (Caching(easy=True, first_exact=18), "18 exact steps at the start and 2 at the end of 20"),
        (Caching(skip_steps=(20,)), "skip step 20 in a run of 20 steps | expected a step from 0 to 19"),
        (Caching(skip_steps=(3, 6)), "skip step 6 | expected none of the first two steps of an expert"),
        (Caching(skip_steps=(19,)), "skip step 19 "),
        (Caching(late_cfg=(1,)), "late-cfg step 1 "),
    ],
)
def test_settings_out_of_range_are_refused(caching, found):
    with pytest.raises(UserError) as error:
        caching.check(EXPERTS)
    assert str(error.value).startswith(found)


@pytest.mark.parametrize("caching", [Caching(easy=True), Caching(skip_steps=(3,)), Caching(late_cfg="auto")])
def test_short_runs_have_no_steps_to_spare(caching):
    with pytest.raises(UserError, match=r"a step cache with 9 steps .* at least 10"):
        caching.check(["dit"] * 9)


def test_lists_are_sorted_numbers():
    assert parse_steps("list", "14, 11,12") == (11, 12, 14)


@pytest.mark.parametrize("text", ["", "1,,2", "1;2", "-1", "1.5", "9" * 30, "1,1", "two", "١"])
def test_other_lists_are_refused(text):
    with pytest.raises(UserError, match=r"^list "):
        parse_steps("list", text)
