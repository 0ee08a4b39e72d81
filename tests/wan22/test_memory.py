"""The peak that commands report is the process's real peak."""

import subprocess
import sys
import threading

import numpy as np

from wan22.memory import peak_rss_bytes, watch_peak

MEBIBYTE = 2**20


def test_the_peak_rises_with_what_is_touched_and_stays_when_it_is_freed():
    before = peak_rss_bytes()
    held = np.ones(max(before, 2**28) // 4, np.float32)  # more than is resident, whatever was freed before
    during = peak_rss_bytes()
    assert during >= held.nbytes
    del held
    assert peak_rss_bytes() >= 0.99 * during  # the system counts in batches


def test_the_peak_sees_what_came_and_went():
    """In a process of its own: in this one other tests' threads come and go."""
    code = f"""
import mmap
from wan22.memory import peak_bytes, reset_peak, resident_bytes
reset_peak()
before = resident_bytes()
with mmap.mmap(-1, {64 * MEBIBYTE}) as block:
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
print(peak_bytes() - before > {60 * MEBIBYTE}, resident_bytes() - before < {30 * MEBIBYTE})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_the_largest_value_is_seen_at_both_ends_of_the_block():
    used = [9]
    with watch_peak(lambda: used[0]) as peak:
        used[0] = 1
    assert peak.bytes == 9
    with watch_peak(lambda: used[0]) as peak:
        used[0] = 9
    assert peak.bytes == 9


def test_a_value_that_comes_and_goes_in_the_block_is_seen():
    readings, all_read = iter([1, 9, 1]), threading.Event()

    def used():
        if (value := next(readings, None)) is None:
            all_read.set()
        return value or 0

    with watch_peak(used) as peak:
        assert all_read.wait(60)
    assert peak.bytes == 9
