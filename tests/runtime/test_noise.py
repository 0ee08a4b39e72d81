import numpy as np
import pytest

from runtime.noise import NormalStream, standard_normal
from wan22.errors import UserError

torch = pytest.importorskip("torch")


def reference(shape, seed):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@pytest.mark.parametrize("size", [*range(1, 41), 100, 1000, 4099])
def test_equals_torch_for_every_small_size(size):
    ours = standard_normal((size,), seed=42)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference((size,), 42), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 12345])
def test_equals_torch_for_every_kind_of_seed(seed):
    np.testing.assert_allclose(standard_normal((3, 33), seed), reference((3, 33), seed), rtol=0, atol=1e-6)


def test_equals_torch_for_the_latents_of_a_480p_video():
    shape = (16, 21, 60, 104)
    np.testing.assert_allclose(standard_normal(shape, 7), reference(shape, 7), rtol=0, atol=1e-6)


def test_a_stream_equals_one_generator_asked_again_and_again():
    stream, generator = NormalStream(5), torch.Generator("cpu").manual_seed(5)
    for shape in ((1, 16, 3, 4, 6), (33,), (2, 48, 1, 5, 3)):
        np.testing.assert_allclose(stream.draw(shape), torch.randn(shape, generator=generator), rtol=0, atol=1e-6)


def test_empty_shape_gives_no_values():
    assert standard_normal((2, 0), 1).shape == (2, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_refuses_seeds_that_torch_does_not_take(seed):
    with pytest.raises(UserError, match="seed"):
        standard_normal((4,), seed)
