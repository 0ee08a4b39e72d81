"""Named dimensions are derived from a call, agree with each other, and are inside a profile or not."""

import pytest

from wan22.component import Tensor
from wan22.errors import UserError
from wan22.shapes import fitting_profile, names_in, parse_size, shape_of, sizes_of

LATENTS = Tensor("latents", "float32", (1, 16, "frames", "height", "width"))
ROPE = Tensor("rope_cos", "float32", ("frames", "rows", "columns", 64))
CACHE = Tensor("cache_31", "float32", (1, 96, 2, "8*height", "8*width"))
SHAPES = {"latents": (1, 16, 21, 60, 104), "rope_cos": (21, 30, 52, 64)}
LANDSCAPE = {"frames": (1, 21, 21), "height": (60, 60, 60), "width": (104, 104, 104)}
PORTRAIT = {"frames": (1, 21, 21), "height": (104, 104, 104), "width": (60, 60, 60)}


@pytest.mark.parametrize("text", ["832x480", "832X480", "832 X 480", "832×480", " 832 * 480 "])
def test_a_size_may_be_written_in_several_ways(text):
    assert parse_size(text) == (832, 480)


@pytest.mark.parametrize("text", ["", "832", "832x", "832x480x3", "-832x480", "8 32x480"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match=r"size .* expected width x height in pixels"):
        parse_size(text)


def test_a_size_that_nobody_has_is_told_from_what_is_no_size():
    with pytest.raises(UserError, match=r"size 9{60}… \| expected at most 6 digits a side"):
        parse_size("9" * 5000 + "x480")


def test_sizes_are_read_off_the_shapes_of_a_call():
    sizes = sizes_of([LATENTS, ROPE], SHAPES)
    assert sizes == {"frames": 21, "height": 60, "width": 104, "rows": 30, "columns": 52}
    assert sizes_of([CACHE], {"cache_31": (1, 96, 2, 480, 832)}) == {"height": 60, "width": 104}


def test_shapes_follow_from_sizes():
    assert shape_of(CACHE, {"height": 60, "width": 104}) == (1, 96, 2, 480, 832)
    assert names_in([CACHE, ROPE]) == ("height", "width", "frames", "rows", "columns")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rope_cos": (20, 30, 52, 64)}, "frames is 20 in rope_cos, expected 21 as in latents"),
        ({"rope_cos": (21, 31, 52, 64)}, r"rows is 31 in rope_cos, expected height / 2 = 30 \(latents\)"),
        ({"latents": (1, 16, 21, 60)}, "latents has shape .* expected 5 dimensions"),
        ({"latents": (1, 48, 21, 60, 104)}, "latents has a dimension of 48, expected 16"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sizes_of([LATENTS, ROPE], SHAPES | changed)


def test_a_multiple_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"8\*height is 484 in cache_31, expected 480"):
        sizes_of([CACHE], {"cache_31": (1, 96, 2, 484, 832)})


def test_the_profile_that_holds_the_call_is_chosen():
    assert fitting_profile({"frames": 5, "height": 104, "width": 60}, [LANDSCAPE, PORTRAIT]) == 1


def test_a_call_outside_every_profile_is_told_the_dimension_and_the_ranges():
    with pytest.raises(UserError, match=r"frames 22 \(in latents\) \| expected frames 1…21 or frames 1…21 \| run"):
        fitting_profile({"frames": 22, "height": 60, "width": 104}, [LANDSCAPE, PORTRAIT])


def test_an_engine_without_profiles_takes_any_size():
    assert fitting_profile({"frames": 999}, []) == 0
