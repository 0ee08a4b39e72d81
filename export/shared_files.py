"""Weights that a bundle does not copy: the checkpoint's own files, cloned or hard-linked into it (``--link``).

A clone shares blocks of the disk until one of the two is written to, so it is as good as a copy; ext4 has none. A hard
link is one file under two names: whoever changes the checkpoint in place changes the bundle, which the bundle's hashes
would tell, and ONNX's own checker refuses such files. ONNX Runtime and TensorRT read them. Hence only when asked for.
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


def shareable(weights: Weights, wanted: Mapping[str, Planned]) -> dict[str, Stored]:
    """The tensors of ``wanted`` that the checkpoint has just so, in files that are mostly such tensors."""
    known = frozenset(weights.names())
    stored = {key: weights.stored(key) for key in wanted if key in known}
    same = {k: s for k, s in stored.items() if s and (s.dtype, s.shape) == (wanted[k].dtype, wanted[k].shape)}
    used_bytes: dict[Path, int] = {}
    for tensor in same.values():
        used_bytes[tensor.path] = used_bytes.get(tensor.path, 0) + tensor.size_bytes
    return {k: s for k, s in same.items() if used_bytes[s.path] * 2 >= s.path.stat().st_size}


def shared_name(part: str, path: Path) -> str:
    """What a file of the checkpoint is called in the bundle."""
    return f"{part}-{path.name}"


def shared_placements(part: str, shared: Mapping[str, Stored]) -> dict[str, Placed]:
    return {key: Placed(shared_name(part, s.path), s.offset, s.size_bytes) for key, s in shared.items()}


def share(path: Path, target: Path) -> None:
    """Makes ``target`` a clone of ``path``, or another name of it where the file system cannot clone.

    Raises:
        UserError: the two places are not on one file system.
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
            raise UserError(found, "both on one file system that has links", "leave out --link") from None
