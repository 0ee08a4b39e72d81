"""The resident memory of this process as reported by the system, and the peak of a varying value."""

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
    """The peak resident memory since the start or the last reset, including mapped files."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Reset the high-water mark of this process's memory, if the system supports it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark then also covers earlier work


def peak_rss_bytes() -> int:
    """:func:`peak_bytes` plus the peak of the largest finished child.

    ``getrusage`` is unreliable for the process itself: its value may be inherited from the parent at the start.
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
    """Yield the peak of ``used_bytes``, which a thread samples every few milliseconds while the block runs."""
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
