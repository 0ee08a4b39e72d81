"""The resident memory of this process, the memory still available to it, and the peak of a varying value."""

import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def available_host_bytes() -> float:
    """The memory that this process can still allocate: the least of system, control group and process limit."""
    system = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = [1024.0 * int(system[1])] if system else []
    with suppress(OSError, ValueError):  # no such group, or no limit
        group = Path("/sys/fs/cgroup")
        cached = re.search(r"^file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
        free.append(float(int((group / "memory.max").read_text()) - used))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(float(limit - _status_bytes("VmSize")))
    return max(0.0, min(free, default=0.0))


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
