"""How fast an expert comes back from pinned host memory, and from pageable memory beside it."""

import ctypes
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from studies.gpu.stage import Measurement, StageSettings
from studies.gpu.timing import median_ms

PIECE_BYTES, RUNS = 2**30, 5
EXPERT_BYTES = {"fp8": 14.3e9, "bf16": 28.6e9}  # of T2V-A14B


def rate(setting: StageSettings) -> Iterator[Measurement]:
    """Copy pieces to the device: bytes a second, and the seconds of an expert at that rate."""
    size = 2**20 if setting.dry_run else PIECE_BYTES
    for kind, copy in _copies(setting, size).items():
        gb_s = size / median_ms(setting.device, copy, RUNS) / 1e6
        yield Measurement(f"from {kind} memory", gb_s, "GB/s", f"{size / 2**20:.0f} MiB at a time")
        for precision, expert in EXPERT_BYTES.items():
            yield Measurement(f"an expert in {precision}, from {kind} memory", expert / gb_s / 1e9, "s", "computed")


def _copies(setting: StageSettings, size: int) -> dict[str, Any]:
    pageable = np.ones(size, np.uint8)
    if setting.dry_run:
        there = np.empty(size, np.uint8)
        return {"pinned": lambda: np.copyto(there, pageable), "pageable": lambda: np.copyto(there, pageable)}
    cupy = import_module("cupy")
    memory, stream = cupy.cuda.alloc(size), cupy.cuda.Stream(non_blocking=True)
    pinned = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size), 0)

    def from_pinned() -> None:
        memory.copy_from_host_async(ctypes.c_void_p(pinned.ptr), size, stream)
        stream.synchronize()

    return {
        "pinned": from_pinned,
        "pageable": lambda: memory.copy_from_host(ctypes.c_void_p(pageable.ctypes.data), size),
    }
