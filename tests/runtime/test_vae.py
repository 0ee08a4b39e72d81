import weakref

import numpy as np
import pytest

from runtime.vae import decode, encode
from wan22.component import Tensor


class Stage:
    """A graph with two caches. It returns chunk totals, so that the caches affect the results."""

    def __init__(self, given, made, repeat, *, takes_caches):
        caches = ("cache_00", "cache_01")
        self.inputs = tuple(Tensor(n, "float32", ()) for n in (given, *(caches if takes_caches else ())))
        self.outputs = tuple(Tensor(n, "float32", ()) for n in (made, *(f"next_{c}" for c in caches)))
        self.given, self.repeat, self.takes_caches, self.calls = given, repeat, takes_caches, []

    def __call__(self, **inputs):
        assert set(inputs) == {tensor.name for tensor in self.inputs}
        chunk = inputs[self.given]
        assert chunk.flags.c_contiguous
        self.calls.append({name: id(value) for name, value in inputs.items()})
        before = inputs["cache_00"] if self.takes_caches else np.zeros((1, 1, 1, 1, 1), np.float32)
        total = before + chunk.sum(axis=2, keepdims=True)
        self.made = (total, total + 100)
        return (np.repeat(total, self.repeat, axis=2), *self.made)


def decoder():
    return (
        Stage("latents", "frames", 1, takes_caches=False),
        Stage("latents", "frames", 4, takes_caches=True),
    )


def encoder():
    return (
        Stage("frames", "latents", 1, takes_caches=False),
        Stage("frames", "latents", 1, takes_caches=True),
    )


def numbered(frames):
    return np.arange(1, frames + 1, dtype=np.float32).reshape(1, 1, frames, 1, 1)


def test_decode_yields_one_frame_then_fours_and_carries_the_caches():
    chunks = [chunk.ravel().tolist() for chunk in decode(*decoder(), numbered(4))]
    assert chunks == [[1], [3] * 4, [6] * 4, [10] * 4]


def test_one_latent_frame_needs_no_graph_for_more():
    first, _ = decoder()
    assert len(list(decode(first, None, numbered(1)))) == 1
    with pytest.raises(ValueError, match="later chunks"):
        list(decode(first, None, numbered(2)))


def test_decode_starts_before_the_last_latent_is_looked_at():
    first, following = decoder()
    chunks = decode(first, following, numbered(3))
    next(chunks)
    assert (len(first.calls), len(following.calls)) == (1, 0)


def test_caches_are_handed_on_without_a_copy():
    first, following = decoder()
    list(decode(first, following, numbered(2)))
    assert following.calls[0]["cache_00"] == id(first.made[0])
    assert following.calls[0]["cache_01"] == id(first.made[1])


def test_caches_of_the_past_are_let_go():
    first, following = decoder()
    chunks = decode(first, following, numbered(3))
    next(chunks)
    old = weakref.ref(first.made[1])
    first.made = ()
    next(chunks)
    assert old() is None


def test_encode_takes_frame_0_then_fours():
    told = []
    latents = encode(*encoder(), numbered(9), lambda *state: told.append(state))
    assert latents.ravel().tolist() == [1, 15, 45]  # 1, 1+2+...+5, 1+2+...+9
    assert told == [("encode image", done, 9, "frames") for done in (1, 5, 9)]


def test_encode_of_one_image_needs_the_first_graph_alone():
    assert encode(encoder()[0], None, numbered(1)).shape == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_encode_refuses_a_broken_group_of_frames(frames):
    with pytest.raises(ValueError, match=f"{frames} frames"):
        encode(*encoder(), numbered(frames))
