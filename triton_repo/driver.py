"""Whether this machine has a GPU for a bundle, asked of the driver, before a server is started for it."""

import ctypes
from pathlib import Path

from triton_repo.repository import is_for_gpu
from wan22.bundle import open_bundle
from wan22.errors import UserError

DRIVER = "libcuda.so.1"


def check_gpu(engines: Path) -> None:
    """Refuse engines for a GPU where there is none.

    Raises:
        UserError: there is no bundle of engines, or no GPU that the driver offers.
    """
    bundle = open_bundle(engines, "engines")
    build = bundle.manifest.build
    if build is not None and is_for_gpu(bundle) and not gpus():
        found = f"{engines} for {build.target}, and no usable NVIDIA GPU here"
        raise UserError(found, "a GPU and its driver", "serve them where there is one, or build with --target cpu")


def gpus() -> int:
    """The number of GPUs that CUDA's driver offers; 0 without a driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    count = ctypes.c_int()
    works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if works else 0
