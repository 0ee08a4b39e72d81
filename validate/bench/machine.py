"""The machine that a bench runs on: its hardware, its load, and the energy and memory of its GPU.

GPU values come from NVIDIA's management library. Its Python package (``nvidia-ml-py``) and a GPU are optional.
"""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from wan22.memory import Peak, watch_peak

BUSY = 0.5  # a machine with a higher load average per core is not idle
LIBRARIES = ("wan-trt", "onnxruntime", "torch", "diffusers", "transformers", "numpy")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def load_average() -> float:
    """The load average of the last minute: processes that run or wait for a core."""
    return os.getloadavg()[0]


def machine() -> dict[str, Any]:
    """The properties that determine speed. Absolute times are comparable only if all of them agree."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = Nvml.open()
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(memory / 2**30),
        "gpu": gpu.name if gpu else "",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor()


# -- the GPU


@dataclass(frozen=True)
class Nvml:
    """The first GPU, through NVIDIA's management library."""

    library: Any
    handle: Any

    @classmethod
    def open(cls) -> "Nvml | None":
        """Open the first GPU; None without the package, the driver or a GPU."""
        try:
            library = import_module("pynvml")
            library.nvmlInit()
            return cls(library, library.nvmlDeviceGetHandleByIndex(0))
        except Exception:  # the package's error classes cannot be named if it is missing
            return None

    @property
    def name(self) -> str:
        name = self.library.nvmlDeviceGetName(self.handle)
        return name.decode() if isinstance(name, bytes) else str(name)

    def joules(self) -> float | None:
        """Energy used since the driver was loaded; None if this GPU does not count it."""
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except Exception:
            return None

    def used_bytes(self) -> int:
        """GPU memory in use by all processes."""
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)


@contextmanager
def device_peak() -> Iterator[Peak | None]:
    """Track the peak of GPU memory in use by all processes during the block; None without a GPU."""
    gpu = Nvml.open()
    if gpu is None:
        yield None
        return
    with watch_peak(gpu.used_bytes) as peak:
        yield peak
