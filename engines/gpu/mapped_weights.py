"""Memory-mapped weights whose pages are dropped during the build.

The builder copies weights into its own structures, but mapped pages that it has read stay resident until memory runs
short. They would count against the process and inflate its peak by the size of the model. Read-only pages can be
dropped at any time: a later access reads them from the file again.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir


class MappedWeights:
    """The stored tensors of the ONNX file ``graph``; pointers remain valid as long as this object exists."""

    def __init__(self, graph: Path) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        initializers = ir.load(graph).graph.initializers.values()
        tensors = (value.const_value for value in initializers)
        self._tensors = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        for location in {str(tensor.location) for tensor in self._tensors}:
            with (graph.parent / location).open("rb") as file:
                self._maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def load_into(self, parser: Any) -> bool:
        """Pass the address of every tensor to an ONNX parser; False if it rejects one."""
        starts = {location: np.frombuffer(mapped, np.uint8).ctypes.data for location, mapped in self._maps.items()}
        return all(
            parser.load_initializer(tensor.name, starts[str(tensor.location)] + (tensor.offset or 0), tensor.nbytes)
            for tensor in self._tensors
        )

    def drop_pages(self) -> None:
        """Drop all pages read so far from memory."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)
