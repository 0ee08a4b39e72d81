import numpy as np
import pytest

from runtime.forward_inputs import rope_tables, time_features
from wan22.errors import UserError
from wan22.specs import SPECS


def test_time_features_at_zero_are_ones_then_zeros():
    features = time_features([0.0])
    assert features.dtype == np.float32
    assert features.shape == (1, 256)
    np.testing.assert_array_equal(features[0], [1] * 128 + [0] * 128)


def test_every_row_has_its_own_timestep():
    both = time_features([0.0, 833.0])
    np.testing.assert_array_equal(both, np.concatenate([time_features([0.0]), time_features([833.0])]))


def test_time_features_equal_diffusers():
    torch, embeddings = pytest.importorskip("torch"), pytest.importorskip("diffusers.models.embeddings")
    timesteps = [0.0, 1.0, 235.0, 625.0, 2500 / 3, 937.5, 999.0, 1000.0]
    theirs = embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(timesteps))
    np.testing.assert_allclose(time_features(timesteps), theirs.numpy(), rtol=0, atol=5e-5)  # theirs is float32


def test_first_frequency_is_the_timestep_itself():
    timesteps = np.float32([3.25, 997.0])
    np.testing.assert_allclose(time_features(timesteps)[:, 0], np.cos(timesteps.astype(np.float64)), atol=1e-7)


@pytest.mark.parametrize("model", SPECS)
def test_rope_tables_equal_diffusers(model):
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    width = SPECS[model].dit.head_width
    frames, rows, columns = 5, 6, 10
    theirs = transformer.WanRotaryPosEmbed(width, (1, 2, 2), 1024)(torch.zeros(1, 16, frames, 2 * rows, 2 * columns))
    for ours, repeated in zip(rope_tables(width, frames, rows, columns), theirs, strict=True):
        assert ours.dtype == np.float32
        expected = repeated.numpy().reshape(frames, rows, columns, width)[..., ::2]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7)


def test_the_first_token_is_not_turned():
    cos, sin = rope_tables(128, 2, 3, 4)
    assert (cos[0, 0, 0] == 1).all()
    assert (sin[0, 0, 0] == 0).all()


def test_pairs_turn_with_frame_then_row_then_column():
    _, sin = rope_tables(128, 2, 2, 2)
    turned = [np.flatnonzero(sin[index]).tolist() for index in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert turned == [list(range(22)), list(range(22, 43)), list(range(43, 64))]


@pytest.mark.parametrize("grid", [(1025, 1, 1), (1, 1025, 1), (1, 1, 1025)])
def test_refuses_positions_the_model_does_not_know(grid):
    with pytest.raises(UserError, match="1025"):
        rope_tables(128, *grid)


def test_the_last_position_is_1023():
    assert rope_tables(128, 1024, 1, 1)[0].shape == (1024, 1, 1, 64)
