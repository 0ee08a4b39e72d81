import numpy as np
import pytest

from runtime.bicubic import resize_bicubic

torch = pytest.importorskip("torch")

SIZES = [((64, 48), (80, 60)), ((480, 832), (464, 832)), ((1104, 832), (720, 544)), ((33, 1999), (16, 1600))]


@pytest.mark.parametrize(
    ("size", "wanted"), [*SIZES, ((17, 16), (1280, 720)), ((20, 20), (20, 20)), ((3000, 40), (16, 16))]
)
def test_equals_torch(size, wanted):
    image = np.random.default_rng(0).uniform(-1, 1, (3, *size)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(image)[None], wanted, mode="bicubic")[0].numpy()
    ours = resize_bicubic(image, *wanted)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_same_size_changes_nothing():
    image = np.random.default_rng(1).uniform(-1, 1, (3, 20, 30)).astype(np.float32)
    np.testing.assert_array_equal(resize_bicubic(image, 20, 30), image)


def test_an_edge_overshoots():
    step = np.where(np.arange(16) < 8, -1, 1).astype(np.float32)
    assert resize_bicubic(np.broadcast_to(step, (1, 16, 16)), 24, 24).max() > 1.05
