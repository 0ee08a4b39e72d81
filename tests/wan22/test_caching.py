"""Step caches that cannot work are refused with a reason."""

import math

import pytest

from wan22.caching import Caching, computed_steps, parse_steps
from wan22.errors import UserError

EXPERTS = ["high_noise"] * 6 + ["low_noise"] * 14
GUIDANCE = {"high_noise": 3.0, "low_noise": 4.0}


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
        (Caching(skip_steps=(3, 6)), "skip step 6 | expected none of steps 0, 1, 6, 7: the first two of each expert"),
        (Caching(skip_steps=(19,)), "skip step 19 | expected a step before 19, the last of the run"),
        (Caching(late_cfg=(1,)), "late-cfg step 1 "),
        (Caching(skip_steps=(3, 4, 8), late_cfg=(3, 8, 9)), "skip and late-cfg step 3, 8 | expected each step in one"),
    ],
)
def test_settings_out_of_range_are_refused(caching, found):
    with pytest.raises(UserError) as error:
        caching.check(EXPERTS, GUIDANCE)
    assert str(error.value).startswith(found)


@pytest.mark.parametrize("caching", [Caching(easy=True), Caching(skip_steps=(3,)), Caching(late_cfg="auto")])
def test_short_runs_have_no_steps_to_spare(caching):
    with pytest.raises(UserError, match=r"a step cache with 9 steps .* at least 10"):
        caching.check(["dit"] * 9, {"dit": 5.0})


def test_late_guidance_needs_guidance_in_its_steps():
    without = GUIDANCE | {"high_noise": 1}
    with pytest.raises(UserError, match=r"late-cfg step 4 \| expected a step of an expert with guidance, not of high_"):
        Caching(late_cfg=(4, 10)).check(EXPERTS, without)
    for late in ((10,), "auto"):
        Caching(late_cfg=late).check(EXPERTS, without)
    with pytest.raises(UserError, match="late cfg without guidance"):
        Caching(late_cfg="auto").check(["low_noise"] * 20, {"high_noise": 3.0, "low_noise": 1})


def test_a_long_list_is_quoted_by_its_beginning():
    for text in ("x" * 5000, ",".join(["7"] * 5000)):
        with pytest.raises(UserError) as error:
            parse_steps("list", text)
        assert f"list '{text[:60]}…'" in str(error.value)
        assert len(str(error.value)) < 200


def test_lists_are_sorted_numbers():
    assert parse_steps("list", "14, 11,12") == (11, 12, 14)


@pytest.mark.parametrize("text", ["", "1,,2", "1;2", "-1", "1.5", "9" * 30, "1,1", "two", "١"])
def test_other_lists_are_refused(text):
    with pytest.raises(UserError, match=r"^list "):
        parse_steps("list", text)
