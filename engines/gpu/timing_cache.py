"""Kernel timings from earlier TensorRT builds, in a file shared between builds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wan22.errors import UserError
from wan22.files import whole_file


@contextmanager
def timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Load the timings in ``path`` into ``config`` for the block, and save its timings there afterwards.

    Raises:
        UserError: ``path`` cannot be such a file; raised before the block.
    """
    if path is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"timing cache {path}: {error.strerror}", "a writable file", "choose another") from None
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    yield
    with whole_file(path, wait=True) as partial:
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
