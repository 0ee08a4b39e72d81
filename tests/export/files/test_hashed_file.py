"""A hashed file contains what was put into it, for all sizes, resume positions and file systems."""

import errno
import fcntl
import hashlib
import os

import numpy as np
import pytest

from export.files import hashed_file
from export.files.hashed_file import BLOCK_BYTES, HOLE_BYTES, HashedFile


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(hashed_file, "BUFFER_BYTES", 2**20)


def random_bytes(count):
    return np.random.default_rng(count).integers(0, 256, count, np.uint8)


def put(path, parts, begun=0, digest=None):
    with HashedFile(path, begun, digest) as file:
        for part in parts:
            file.put(part)
        return file.written()


def is_right(path, entry, expected):
    data = path.read_bytes()
    return data == expected and entry.size_bytes == len(data) and entry.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("sizes", [[], [1], [BLOCK_BYTES], [2**20], [7, 3 * 2**20, 5000], [2**20 - 1, 1, 1]])
def test_the_file_holds_what_was_put(tmp_path, sizes):
    parts = [random_bytes(size) for size in sizes]
    entry = put(tmp_path / "f", parts)
    assert is_right(tmp_path / "f", entry, b"".join(part.tobytes() for part in parts))


def test_what_was_put_may_change_afterwards(tmp_path):
    part = random_bytes(1000)
    expected = part.tobytes()
    with HashedFile(tmp_path / "f") as file:
        file.put(part)
        part[:] = 0
        assert is_right(tmp_path / "f", file.written(), expected)


def test_an_entry_between_is_of_what_is_there_so_far(tmp_path):
    first, second = random_bytes(5000), random_bytes(2**21 + 3)
    with HashedFile(tmp_path / "f") as file:
        file.put(first)
        assert is_right(tmp_path / "f", file.written(), first.tobytes())
        file.put(second)
        assert is_right(tmp_path / "f", file.written(), first.tobytes() + second.tobytes())


@pytest.mark.parametrize("begun", [0, 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 17, 2**21 + 9])
def test_it_goes_on_behind_what_stays(tmp_path, begun):
    old, new = random_bytes(2**22), random_bytes(2**20 + 11)
    (tmp_path / "f").write_bytes(old)
    kept = old[:begun].tobytes()
    entry = put(tmp_path / "f", [new], begun, hashlib.sha256(kept))
    assert is_right(tmp_path / "f", entry, kept + new.tobytes())


def test_zeros_take_no_space_and_are_read_as_zeros(tmp_path):
    parts = [random_bytes(10), np.zeros(8 * HOLE_BYTES, np.uint8), random_bytes(10), np.zeros(8 * HOLE_BYTES, np.uint8)]
    entry = put(tmp_path / "f", parts)
    assert is_right(tmp_path / "f", entry, b"".join(part.tobytes() for part in parts))
    assert (tmp_path / "f").stat().st_blocks * 512 <= 4 * HOLE_BYTES


def test_a_file_system_without_direct_writes_gets_the_same(tmp_path, monkeypatch):
    def opened(path, flags, mode, original=os.open):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, mode)

    monkeypatch.setattr(hashed_file.os, "open", opened)
    data = random_bytes(2**21 + 5)
    assert is_right(tmp_path / "f", put(tmp_path / "f", [data]), data.tobytes())


@pytest.mark.parametrize("direct", [0, 1, 2])
def test_a_file_system_that_refuses_only_to_write_gets_the_same(tmp_path, monkeypatch, direct):
    written = []

    def write(file, data, place, original=os.pwrite):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            if len(written) == direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            written.append(place)
            data = data[: len(data) - 100]  # like on a nearly full disk
        return original(file, data, place)

    monkeypatch.setattr(hashed_file.os, "pwrite", write)
    parts = [random_bytes(2**21 + 5), np.zeros(8 * HOLE_BYTES, np.uint8), random_bytes(2**20 + 7)]
    assert is_right(tmp_path / "f", put(tmp_path / "f", parts), b"".join(part.tobytes() for part in parts))


def test_a_fault_of_the_disk_reaches_who_writes(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with HashedFile(tmp_path / "f") as file:
        monkeypatch.setattr(hashed_file.os, "pwrite", full)
        file.put(random_bytes(100))
        with pytest.raises(OSError, match="No space"):
            file.written()
