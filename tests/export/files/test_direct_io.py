"""Direct reads return the file's content, and memory is reused only after its last view is gone."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from export.files import direct_io
from export.files.direct_io import BLOCK_BYTES, aligned_memory, read_direct

SIZE = 5 * 2**20 + 123


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def file(tmp_path, data):
    (tmp_path / "f").write_bytes(data.tobytes())
    return tmp_path / "f"


@pytest.mark.parametrize(
    ("place", "count"),
    [(0, SIZE), (0, 4), (7, 2**20), (BLOCK_BYTES, 2**21), (BLOCK_BYTES - 1, 2**22 + 2), (SIZE - 3, 3)],
)
def test_any_stretch_is_what_the_file_holds(file, data, place, count):
    assert np.array_equal(read_direct(file, place, count), data[place : place + count])


def test_a_file_system_that_cannot_gives_the_same(file, data, monkeypatch):
    def opened(path, flags, mode=0o777, original=os.open):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, mode)

    monkeypatch.setattr(direct_io.os, "open", opened)
    assert np.array_equal(read_direct(file, 5, SIZE - 5), data[5:])


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_only_to_read_gives_the_same(file, data, monkeypatch, refusal):
    def read(descriptor, buffers, place, original=os.preadv):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(refusal, os.strerror(refusal))
        return original(descriptor, buffers, place)

    open_before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(direct_io.os, "preadv", read)
    assert np.array_equal(read_direct(file, 5, SIZE - 5), data[5:])
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_reads_that_end_within_a_block_are_gone_on_with(file, data, monkeypatch):
    def read(descriptor, buffers, place, original=os.preadv):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and place % BLOCK_BYTES:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(descriptor, [buffers[0][:1_000_003]], place)

    monkeypatch.setattr(direct_io.os, "preadv", read)
    assert np.array_equal(read_direct(file, 5, SIZE - 5), data[5:])


def test_a_fault_that_has_another_cause_is_told(file, monkeypatch):
    def read(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(direct_io.os, "preadv", read)
    with pytest.raises(OSError, match="Invalid argument"):
        read_direct(file, 5, SIZE - 5)


@pytest.mark.parametrize("count", [4, 2**22])
def test_a_file_that_ends_too_early_is_told(file, count):
    with pytest.raises(EOFError, match="ends after"):
        read_direct(file, SIZE - 2, count)


def test_memory_is_used_again_when_its_last_view_is_gone(monkeypatch):
    monkeypatch.setattr(direct_io, "_kept", [])
    first = aligned_memory(2**21)
    address, view = first.ctypes.data, first[100:200].view(np.float32).reshape(5, 5)
    del first
    other = aligned_memory(2**21)
    assert other.ctypes.data != address
    del view
    again = aligned_memory(2**21 - BLOCK_BYTES)
    assert again.ctypes.data == address
    assert address % BLOCK_BYTES == 0


def test_little_memory_is_kept(monkeypatch):
    monkeypatch.setattr(direct_io, "_kept", [])
    monkeypatch.setattr(direct_io, "KEPT_BYTES", 2**22)
    lent = [aligned_memory(2**21) for _ in range(5)] + [aligned_memory(4096)]
    lent.clear()
    assert [len(memory) for memory in direct_io._kept] == [2**21, 2**21]
