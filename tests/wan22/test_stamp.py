"""A plan's stamp is read from its file, without TensorRT."""

import pytest

from wan22.specs import Precision
from wan22.stamp import Stamp, read_name

STAMP = Stamp("h100", Precision.FP8, ({"frames": (5, 5, 9), "height": (8, 8, 8)}, {"frames": (1, 1, 1)}))


@pytest.mark.parametrize("behind", [b"\x01\x80", b" readable {too} ]}", b"}]}\x00", b""])
def test_the_name_is_found_whatever_lies_around_it(tmp_path, behind):
    (tmp_path / "plan").write_bytes(b"ftrt\x00wan-trt\xff" * 10_000 + STAMP.name.encode() + behind)
    assert read_name(tmp_path / "plan") == STAMP.name


@pytest.mark.parametrize("content", [b"", b"no name", b"Unnamed Network 0", b"wan-trt "])
def test_a_plan_without_a_name_of_ours_has_none(tmp_path, content):
    (tmp_path / "plan").write_bytes(content)
    assert read_name(tmp_path / "plan") == ""


def test_a_name_that_was_cut_short_is_not_taken_for_none(tmp_path):
    (tmp_path / "plan").write_bytes(STAMP.name.encode()[:30])
    assert read_name(tmp_path / "plan") == STAMP.name[:30]
