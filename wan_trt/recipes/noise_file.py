"""Read initial noise from a file, such as the official release's CUDA noise or a benchmark's fixed latent."""

from pathlib import Path

import numpy as np

from export.files.torch_reader import read_tensor
from runtime.arrays import F32
from wan22.errors import UserError
from wan22.inputs import check_regular


def read_noise(path: Path) -> F32:
    """The only array of an ``.npz``, ``.npy``, ``.pt`` or ``.pth`` file as float32, without running code of the file.

    Raises:
        UserError: there is no such file, it has another format, several arrays, or an array of another type.
    """
    check_regular(path)
    if path.suffix in (".pt", ".pth"):
        found = read_tensor(path).read()
    elif path.suffix in (".npz", ".npy"):
        found = _numpy(path)
    else:
        raise UserError(f"noise {path}", "a name ending in .npz, .npy, .pt or .pth", "save the array as one of these")
    if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
        raise UserError(f"{path} contains {found.dtype}", "floating-point noise", "save float32")
    return np.ascontiguousarray(found, np.float32)


def _numpy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            names = loaded.files
            array: np.ndarray | None = loaded[names[0]] if len(names) == 1 else None
    except OSError as error:
        raise UserError(f"noise {path}: {error.strerror or error}", "a readable file", "name another") from None
    except Exception as error:  # numpy parses a damaged header as Python, which raises errors of many types
        found = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"noise {path}: {found}", "an array that numpy saved", "save it again") from None
    if array is None:
        raise UserError(f"{path} contains {len(names)} arrays", "one array of noise", "save the noise alone")
    return array
