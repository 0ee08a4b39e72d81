"""How much memory a process has resident, as the system counts it, and the largest of values that come and go."""

import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SAMPLING_SECONDS = 0.005


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Most memory resident since the start or the last reset, mapped files included."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Forgets the high-water mark of the process's memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark then also covers what came before


def peak_rss_bytes() -> int:
    """:func:`peak_bytes` plus the peak of the largest child that has ended.

    ``getrusage`` cannot answer for the process itself: its figure may be the parent's, inherited at the start.
    """
    return peak_bytes() + 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _status_bytes(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@dataclass
class Peak:
    bytes: int


@contextmanager
def watch_peak(used_bytes: Callable[[], int]) -> Iterator[Peak]:
    """The largest value of ``used_bytes``, read every few milliseconds by a thread while the block runs."""
    peak, over = Peak(used_bytes()), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLING_SECONDS):
            peak.bytes = max(peak.bytes, used_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak.bytes = max(peak.bytes, used_bytes())
