"""The weights of a graph as a builder reads them: mapped files, let go of while it works.

A builder copies weights into its own structures. Mapped pages that it has read count as memory of the process and stay
there until the system is short of it, which would make every build look, and on a full machine be, a whole model larger
than it is. Read-only pages of a file can be dropped at any moment: who needs one again gets it from the file.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir


class MappedWeights:
    """The stored tensors of the ONNX file ``graph``; pointers stay good as long as this lives."""

    def __init__(self, graph: Path) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        initializers = ir.load(graph).graph.initializers.values()
        tensors = (value.const_value for value in initializers)
        self._tensors = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        for location in {str(tensor.location) for tensor in self._tensors}:
            with (graph.parent / location).open("rb") as file:
                self._maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def give_to(self, parser: Any) -> bool:
        """Tells an ONNX parser where every tensor lies; False where it does not take one."""
        starts = {location: np.frombuffer(mapped, np.uint8).ctypes.data for location, mapped in self._maps.items()}
        return all(
            parser.load_initializer(tensor.name, starts[str(tensor.location)] + (tensor.offset or 0), tensor.nbytes)
            for tensor in self._tensors
        )

    def let_go(self) -> None:
        """Drops what was read so far from memory; what is read again comes from the file."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)
