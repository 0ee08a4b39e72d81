"""Time and memory on either device, measured in the same way for every library."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch

from wan22.memory import peak_bytes, reset_peak, resident_bytes, watch_peak


def time_ms(device: str, work: Callable[[], Any]) -> float:
    """The milliseconds of ``work`` until the device has finished."""
    started = perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (perf_counter() - started)


def median_ms(device: str, work: Callable[[], Any], runs: int) -> float:
    """The median of ``runs`` timed runs, after a warm-up run."""
    time_ms(device, work)
    return float(np.median([time_ms(device, work) for _ in range(runs)]))


def peak_gib(device: str, work: Callable[[], Any]) -> float:
    """The peak of memory in use during ``work``, minus the use before; on a GPU, of all processes."""
    if device == "cpu":
        reset_peak()
        before = resident_bytes()
        work()
        return (peak_bytes() - before) / 2**30
    torch.cuda.empty_cache()
    before = _used_bytes()
    with watch_peak(_used_bytes) as peak:
        work()
        torch.cuda.synchronize()
    return (peak.bytes - before) / 2**30


def _used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
