"""A file is there whole or not at all."""

import pytest

from wan22.whole_file import whole_file


def test_a_file_that_was_left_half_way_leaves_the_earlier_one(tmp_path):
    (tmp_path / "x").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_a_file_that_cannot_take_its_place_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "folder") as partial:
        partial.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_whole_file_takes_the_place_of_the_earlier_one(tmp_path):
    (tmp_path / "x").write_text("earlier")
    with whole_file(tmp_path / "x") as partial:
        partial.write_text("later")
        assert (tmp_path / "x").read_text() == "earlier"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["later"]
