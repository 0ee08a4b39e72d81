"""The machine that a bench ran on: what it is, how busy it is, and what its GPU spends.

NVIDIA's management library is asked where its Python package (``nvidia-ml-py``) and a GPU are; nothing needs them.
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

BUSY = 0.5  # load average per core from which timings are not those of an idle machine
LIBRARIES = ("wan-trt", "onnxruntime", "torch", "diffusers", "transformers", "numpy")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def load_average() -> float:
    """Processes that wanted a core, averaged over the last minute."""
    return os.getloadavg()[0]


def machine() -> dict[str, Any]:
    """What decides how fast it is. Two runs compare in absolute terms where these agree."""
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
    """The first GPU, as NVIDIA's management library sees it."""

    library: Any
    handle: Any

    @classmethod
    def open(cls) -> "Nvml | None":
        """None without the package, the driver or a GPU."""
        try:
            library = import_module("pynvml")
            library.nvmlInit()
            return cls(library, library.nvmlDeviceGetHandleByIndex(0))
        except Exception:  # the package's errors are classes of its own, which are not there without it
            return None

    @property
    def name(self) -> str:
        name = self.library.nvmlDeviceGetName(self.handle)
        return name.decode() if isinstance(name, bytes) else str(name)

    def joules(self) -> float | None:
        """Energy spent since the driver was loaded; None where this GPU does not count it."""
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except Exception:
            return None

    def used_bytes(self) -> int:
        """By every process."""
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)


@contextmanager
def device_peak() -> Iterator[Peak | None]:
    """The most memory of the GPU in use while the block runs, by every process; None without a GPU."""
    gpu = Nvml.open()
    if gpu is None:
        yield None
        return
    with watch_peak(gpu.used_bytes) as peak:
        yield peak
