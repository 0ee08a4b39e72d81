"""Clone or hard-link the checkpoint's files into a bundle instead of copying their weights (``--link``).

A clone shares disk blocks until either file is written, so it is as safe as a copy; ext4 does not support clones. A
hard link is a second name of the same file: editing the checkpoint in place edits the bundle, which the bundle's hashes
reveal, and ONNX's checker rejects such files although ONNX Runtime and TensorRT read them. Linking is therefore opt-in.
"""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from export.checkpoint.checkpoint import Weights
from export.files.tensor_file import Planned, Stored
from export.graphs.builder import Placed
from wan22.errors import UserError

FICLONE = 0x40049409  # linux/fs.h


def find_shareable(weights: Weights, wanted: Mapping[str, Planned]) -> dict[str, Stored]:
    """The ``wanted`` tensors that the checkpoint stores in the same dtype and shape.

    A file is used only if such tensors take at least half of it.
    """
    known = frozenset(weights.names())
    stored = {key: weights.stored(key) for key in wanted if key in known}
    same = {k: s for k, s in stored.items() if s and (s.dtype, s.shape) == (wanted[k].dtype, wanted[k].shape)}
    used_bytes: dict[Path, int] = {}
    for tensor in same.values():
        used_bytes[tensor.path] = used_bytes.get(tensor.path, 0) + tensor.size_bytes
    return {k: s for k, s in same.items() if used_bytes[s.path] * 2 >= s.path.stat().st_size}


def shared_name(part: str, path: Path) -> str:
    """The name in the bundle of the checkpoint's file ``path``."""
    return f"{part}-{path.name}"


def shared_placements(part: str, shared: Mapping[str, Stored]) -> dict[str, Placed]:
    return {key: Placed(shared_name(part, s.path), s.offset, s.size_bytes) for key, s in shared.items()}


def share(path: Path, target: Path) -> None:
    """Make ``target`` a clone of ``path``, or a hard link where the file system cannot clone.

    Raises:
        UserError: the file system cannot link the two.
    """
    real = path.resolve()  # the hub's cache is symbolic links
    target.unlink(missing_ok=True)
    try:
        with real.open("rb") as source, target.open("wb") as clone:
            fcntl.ioctl(clone, FICLONE, source.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        try:
            os.link(real, target)
        except OSError as error:
            found = f"cannot link {real} into {target.parent.parent}: {error.strerror}"
            raise UserError(found, "both on one file system with hard links", "leave out --link") from None
