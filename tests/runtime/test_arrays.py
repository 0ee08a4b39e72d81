import sys
import types

import numpy as np
import pytest

from runtime.arrays import array_namespace, require_finite, to_numpy
from runtime.schedule import make_schedule
from runtime.solver import make_solver
from wan22.errors import NonFiniteError


def test_numpy_arrays_belong_to_numpy():
    assert array_namespace(np.zeros(3)) is np


def test_another_librarys_arrays_bring_their_own(monkeypatch):
    library = types.ModuleType("gpulib")
    monkeypatch.setitem(sys.modules, "gpulib", library)
    array = type("ndarray", (), {"__module__": "gpulib._core.core", "get": lambda self: np.ones(2)})()
    assert array_namespace(array) is library
    assert to_numpy(array).tolist() == [1, 1]


def test_numpy_arrays_are_already_on_the_host():
    array = np.zeros(3)
    assert to_numpy(array) is array


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_are_counted_and_named(bad):
    with pytest.raises(NonFiniteError, match="the velocity: 2 of 5 values"):
        require_finite(np.float32([1, bad, 2, bad, 3]), "the velocity")


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler", "renoise"])
def test_a_solver_moves_arrays_of_any_library(name):
    """CuPy is not available everywhere, so torch tensors stand in for arrays of another library."""
    torch = pytest.importorskip("torch")
    schedule = make_schedule(name, 4, 5)
    ours, theirs = make_solver(name, schedule), make_solver(name, schedule)
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 3, 3), dtype=np.float32)
    y = torch.from_numpy(x)
    for step in range(4):
        x, y = ours.step(np.sin(x + step), x), theirs.step(torch.sin(y + step), y)
        assert y.dtype == torch.float32
    np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=2e-6)
