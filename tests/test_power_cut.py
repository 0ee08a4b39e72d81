"""After a power cut everything that a command called done is there, byte for byte. Needs root and loop devices.

An ext4 in a file is copied as it lies on its "disk" while it is mounted, and the copy is mounted beside it: what was
only in memory is not in it. The journal is written every second, so that names reach the disk before unsynced contents.
"""

import os
import subprocess
import time

import pytest

from tests.faults.commands import COMMANDS, Forking, make_inputs
from wan22.bundle import sha256_of

TRIED = [name for name, command in COMMANDS.items() if not command.overwrite and name not in ("bench --sweep", "demo")]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The image, and the two places where it and its copy are mounted."""
    folder = tmp_path_factory.mktemp("power")
    image, now, after = folder / "image", folder / "now", folder / "after"
    now.mkdir()
    after.mkdir()
    with image.open("wb") as file:
        file.truncate(600 * 2**20)
    if os.getuid() or subprocess.run(["mkfs.ext4", "-q", "-F", image], check=False).returncode:
        pytest.skip("needs root and mkfs.ext4")
    if subprocess.run(["mount", "-o", "loop,commit=1", image, now], check=False).returncode:
        pytest.skip("needs loop devices")
    yield image, now, after
    subprocess.run(["umount", now], check=True)


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    forking = Forking(tmp_path_factory.mktemp("forking"))
    yield forking
    forking.close()


@pytest.fixture(scope="module")
def inputs(forking, disk):
    """On the same disk, so that files can be linked."""
    return make_inputs(forking, disk[1] / "inputs")


def contents(folder):
    return {path.relative_to(folder): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_what_was_called_done_outlives_a_power_cut(name, forking, inputs, disk):
    if name in ("inspect", "lora apply") and inputs.blocks is None:
        pytest.skip("builds need tensorrt-rtx")
    image, now, after = disk
    to = now / name.replace(" ", "_")
    to.mkdir()
    subprocess.run(["sync", "-f", now], check=True)
    ended = forking.run(COMMANDS[name].words(inputs, to))
    assert ended.code == 0, ended.text
    time.sleep(2)  # two journals later
    cut = image.with_name("cut")
    subprocess.run(["cp", "--sparse=always", image, cut], check=True)
    expected = contents(to)
    assert len(expected) >= 1
    subprocess.run(["mount", "-o", "loop", cut, after], check=True)
    try:
        assert contents(after / to.name) == expected
    finally:
        subprocess.run(["umount", after], check=True)
