"""How much memory this process really takes: the system's own figures, from ``/proc/self/status``."""

import re
import resource
from pathlib import Path


def peak_rss_bytes() -> int:
    """The peak of this process, plus that of its largest ended child.

    What ``getrusage`` says of the process itself may be its parent's, inherited at start.
    """
    return peak_bytes() + 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def peak_bytes() -> int:
    """Most memory resident since the start or the last reset, mapped files included."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def reset_peak() -> None:
    """Forgets the high-water mark of the process's memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark then also covers what came before


def _status_bytes(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
