"""Wheels arrive whole in small parts, or the part that did not is named."""

import json
import subprocess
import sys
import zipfile

import pytest

from studies.gpu.pack import INDEX, PART_BYTES, pack_wheels, unpack_wheels
from wan22.errors import UserError


@pytest.fixture
def wheel(tmp_path):
    """A wheel of one module, ``carried``."""
    path = tmp_path / "carried-1.0-py3-none-any.whl"
    info = "carried-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("carried.py", "VALUE = 41 + 1\n" + "# padding\n" * 500)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"carried.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def test_a_wheel_is_cut_and_installed_again(tmp_path, wheel):
    count = pack_wheels([wheel], tmp_path / "parts", part_bytes=1000)
    parts = sorted(path for path in (tmp_path / "parts").iterdir() if path.name != INDEX)
    assert len(parts) == count > 3
    assert max(path.stat().st_size for path in parts) == 1000
    wheel.unlink()
    assert unpack_wheels(tmp_path / "parts", tmp_path / "site") == ["carried-1.0-py3-none-any.whl"]
    words = [sys.executable, "-c", "import carried; print(carried.VALUE)"]
    done = subprocess.run(words, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_parts_are_small_enough():
    assert PART_BYTES <= 60 * 2**20


@pytest.mark.parametrize(("change", "words"), [("unlink", "missing"), ("truncate", "damaged")])
def test_a_part_that_did_not_arrive_is_named_and_nothing_is_installed(tmp_path, wheel, change, words):
    pack_wheels([wheel], tmp_path / "parts", part_bytes=1000)
    part = tmp_path / "parts" / f"{wheel.name}.001"
    if change == "unlink":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{part.name}: {words}"):
        unpack_wheels(tmp_path / "parts", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_wheel_that_pip_refuses_is_named(tmp_path):
    (tmp_path / "bad-1.0-py3-none-any.whl").write_bytes(b"no zip file")
    pack_wheels([tmp_path / "bad-1.0-py3-none-any.whl"], tmp_path / "parts")
    with pytest.raises(UserError, match=r"pip: .*wheels for this Python"):
        unpack_wheels(tmp_path / "parts", tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("content", [None, "{", "[1"])
def test_a_folder_without_an_index_is_refused(tmp_path, content):
    (tmp_path / "parts").mkdir()
    if content is not None:
        (tmp_path / "parts" / INDEX).write_text(content)
    with pytest.raises(UserError, match="an index of parts"):
        unpack_wheels(tmp_path / "parts", tmp_path / "site")


@pytest.mark.parametrize("arguments", [[], ["x.whl", "--unpack", "parts"], ["x.txt"]])
def test_a_call_that_says_nothing_or_too_much_is_one_line(tmp_path, arguments):
    words = [sys.executable, "-m", "studies.gpu.pack", *arguments, "-o", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_the_index_names_every_part_with_its_hash(tmp_path, wheel):
    pack_wheels([wheel], tmp_path / "parts", part_bytes=2000)
    (entry,) = json.loads((tmp_path / "parts" / INDEX).read_text()).values()
    assert set(entry) == {"sha256", "parts"}
    assert {len(digest) for digest in entry["parts"].values()} == {64}
