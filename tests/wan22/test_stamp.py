"""A plan's stamp is read from its file, without TensorRT."""

import pytest

from wan22.errors import UserError
from wan22.precision import Precision
from wan22.stamp import Stamp, check_stamp, read_name

STAMP = Stamp("h100", Precision.FP8, ({"frames": (5, 5, 9), "height": (8, 8, 8)}, {"frames": (1, 1, 1)}))


@pytest.mark.parametrize("behind", [b"\x01\x80", b" readable {too} ]}", b"}]}\x00", b""])
def test_the_name_is_found_whatever_lies_around_it(tmp_path, behind):
    (tmp_path / "plan").write_bytes(b"ftrt\x00wan-trt\xff" * 10_000 + STAMP.name.encode() + behind)
    assert read_name(tmp_path / "plan") == STAMP.name


@pytest.mark.parametrize("content", [b"", b"no name", b"Unnamed Network 0", b"wan-trt "])
def test_a_plan_without_a_name_of_ours_has_none(tmp_path, content):
    (tmp_path / "plan").write_bytes(content)
    assert read_name(tmp_path / "plan") == ""


@pytest.mark.parametrize("name", [STAMP.name[:30], 'wan-trt {"target": ' + "[" * 100_000], ids=["cut short", "deep"])
def test_a_damaged_name_is_not_taken_for_none(tmp_path, name):
    (tmp_path / "plan").write_bytes(name.encode())
    assert read_name(tmp_path / "plan") == name


@pytest.mark.parametrize(
    "rest", ["", "{", '{"target": "\udcf6"}', "[" * 100_000], ids=["empty", "cut", "not UTF-8", "deep"]
)
def test_a_damaged_stamp_is_refused(rest):
    with pytest.raises(UserError, match="expected a stamp of this version"):
        check_stamp("dit.plan", f"wan-trt {rest}", STAMP, "wan-trt build")
