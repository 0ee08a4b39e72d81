"""Bytes come in a unit that shows them, nouns agree with their number."""

import pytest

from wan22.quantities import counted, human_bytes, video_text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (412, "412 B"), (2048, "2.00 KiB"), (13_737_984, "13.10 MiB"), (65 * 2**30, "65.00 GiB")],
)
def test_bytes_are_never_nothing(size, text):
    assert human_bytes(size) == text


def test_digits_can_be_chosen():
    assert human_bytes(1.25 * 2**30, 1) == "1.2 GiB"


def test_one_is_singular():
    assert (counted(1, "frame"), counted(0, "frame"), counted(1200, "step")) == ("1 frame", "0 frames", "1,200 steps")
    assert video_text(64, 48, 1) == "64x48, 1 frame"
