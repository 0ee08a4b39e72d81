"""The GPU that the engines of a pipeline share: one stream, its memory, and the errors when that runs out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from runtime.cuda_graph import RecordedCalls
from runtime.engine import NEXT
from wan22.component import Tensor
from wan22.errors import UserError
from wan22.quantities import human_bytes
from wan22.residency import VRAM_RESERVED
from wan22.shapes import shape_of

TO_RUN = "it to run these engines"


def compute_capability(cupy: Any) -> str:
    """The compute capability of this machine's GPU, such as "8.9".

    Raises:
        UserError: there is no GPU, or its driver does not work.
    """
    try:
        found = str(cupy.cuda.Device().compute_capability)  # "89"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        wanted = "a GPU that the engines were built for"
        raise UserError(f"no usable GPU ({error})", wanted, "check nvidia-smi") from None
    return f"{found[:-1]}.{found[-1]}"


class Gpu:
    """A GPU with a stream of its engines."""

    number = 0  # by which CUDA knows it
    reaches_peers = True  # the memory of the other GPUs of a group

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._last_user: object = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Return CuPy's reserve to the GPU."""
        self.stream.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def used_by(self, engine: object) -> None:
        """Return CuPy's reserve to the GPU if another engine than ``engine`` ran last."""
        if self._last_user is not engine:
            self.cupy.get_default_memory_pool().free_all_blocks()
            self._last_user = engine

    def available_bytes(self) -> float:
        """The memory for engines: free bytes, at most the card's memory less drivers and fragmentation."""
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return float(min(free, total * (1 - VRAM_RESERVED)))

    def out_of_memory(self, what: str) -> UserError:
        """The error for ``what`` not fitting into the free memory."""
        free, total = self.cupy.cuda.runtime.memGetInfo()
        there = f"{human_bytes(free, 1)} free of {human_bytes(total, 1)}"
        remedy = "use --residency one-component, or a smaller --size"
        return UserError(f"no room for {what}: {there}", "more free memory", remedy)

    @contextmanager
    def refuse_out_of_memory(self, name: str) -> Iterator[None]:
        """Turn CuPy's and CUDA's out-of-memory errors in a call of the engine ``name`` into a UserError."""
        try:
            yield
        except self.cupy.cuda.memory.OutOfMemoryError:
            raise self.out_of_memory(f"inputs and outputs of {name}") from None
        except self.cupy.cuda.runtime.CUDARuntimeError as error:
            if "MemoryAllocation" not in str(error):
                raise
            raise self.out_of_memory(f"a call of {name}") from None

    # -- the arrays of a call

    def arrays(
        self,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[Tensor],
        sizes: Mapping[str, int],
        recorded: RecordedCalls | None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs on the device, contiguous, and arrays for the outputs; those of the ``recorded`` call, if any."""
        entering = {name: self.cupy.ascontiguousarray(self.cupy.asarray(array)) for name, array in inputs.items()}
        leaving = {t.name: self.cupy.empty(shape_of(t, sizes), t.dtype) for t in outputs}
        if recorded is None:
            return entering, leaving
        return recorded.keep("in", entering, copy=True), recorded.keep("out", leaving, copy=False)

    def results(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[Tensor], leaving: Mapping[str, Any], *, recorded: bool
    ) -> tuple[Any, ...]:
        """The outputs for the caller, when they are computed: state stays on the device.

        Others are numpy's unless an input other than state is on the device, and copies if the call is ``recorded``,
        since the next one writes to the same arrays.
        """
        names = {tensor.name for tensor in outputs}
        on_device = any(isinstance(x, self.cupy.ndarray) for n, x in inputs.items() if NEXT + n not in names)

        def result(name: str) -> Any:
            array = leaving[name]
            if name.startswith(NEXT):
                return array
            if not on_device:
                return array.get(stream=self.stream)
            return array.copy() if recorded else array

        found = tuple(result(tensor.name) for tensor in outputs)
        self.stream.synchronize()
        return found
