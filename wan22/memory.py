"""How much memory a command really took: the system's own high-water mark."""

import re
import resource
from pathlib import Path


def peak_rss_bytes() -> int:
    """Most memory this process has had resident so far, mapped files included, plus its largest ended child's.

    From ``/proc/self/status``: what ``getrusage`` says of the process itself may be its parent's, inherited at start.
    """
    own = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return ((int(own[1]) if own else 0) + children) * 1024
