"""Named dimensions tie the shapes of a graph's tensors together."""

import pytest

from wan22.bundle import Tensor
from wan22.errors import UserError
from wan22.shapes import bind, check_profile, dimension, names_in

LATENTS = Tensor("latents", "float32", (1, 16, "height", "width"))
CACHE = Tensor("cache", "float32", (1, 96, "8*height", "8*width"))


def test_names_get_the_values_that_fit():
    values = bind([CACHE, LATENTS], {"latents": (1, 16, 4, 6), "cache": (1, 96, 32, 48)})
    assert values == {"height": 4, "width": 6}


@pytest.mark.parametrize(
    "shapes",
    [
        {"latents": (1, 16, 4), "cache": (1, 96, 32, 48)},
        {"latents": (1, 17, 4, 6), "cache": (1, 96, 32, 48)},
        {"latents": (1, 16, 4, 6), "cache": (1, 96, 32, 40)},
        {"latents": (1, 16, 4, 6), "cache": (1, 96, 33, 48)},
    ],
    ids=["rank", "number", "two values", "no multiple"],
)
def test_shapes_that_do_not_fit_name_their_tensor(shapes):
    with pytest.raises(ValueError, match=r"(latents|cache) has shape"):
        bind([LATENTS, CACHE], shapes)


def test_dimensions_of_a_multiple():
    assert names_in([CACHE]) == {"height", "width"}
    assert dimension("8*height", {"height": 4}) == 32


def test_a_size_outside_the_profile_names_dimension_and_range():
    check_profile({"height": 60}, {"height": (30, 60, 90)}, "high_noise")
    check_profile({"height": 60}, {}, "high_noise")
    with pytest.raises(UserError, match=r"height = 91 \| expected 30 to 90"):
        check_profile({"height": 91}, {"height": (30, 60, 90)}, "high_noise")
