"""A call is checked against the graph's edges and the built profiles before anything runs."""

import numpy as np
import pytest

from runtime.engine import check_inputs
from wan22.component import Tensor
from wan22.errors import UserError

EDGES = (Tensor("latents", "float32", (1, 16, "height", "width")), Tensor("text", "float32", (1, 4)))


def call(height=4, dtype=np.float32, **extra):
    return {"latents": np.zeros((1, 16, height, 6), dtype), "text": np.zeros((1, 4), np.float32), **extra}


def test_a_fitting_profile_is_found():
    profiles = [{"height": (8, 8, 8)}, {"height": (2, 4, 6)}]
    assert check_inputs("dit", EDGES, call(), profiles) == 1
    assert check_inputs("dit", EDGES, call(), []) == 0


@pytest.mark.parametrize("given", [call(dtype=np.float64), call(mask=np.zeros(1)), {}], ids=["type", "extra", "none"])
def test_another_signature_is_a_bug(given):
    with pytest.raises(ValueError, match="dit"):
        check_inputs("dit", EDGES, given, [])


def test_a_size_it_was_not_built_for_is_a_user_error():
    with pytest.raises(UserError, match="height 4"):
        check_inputs("dit", EDGES, call(), [{"height": (8, 8, 8)}])
