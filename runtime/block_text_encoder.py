"""A text encoder in stages, called like an engine: its layers are resident, or stream past ahead of the computation.

The embedding, a fifth of the weights, stays on disk: a prompt reads a row for each of its tokens.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from runtime.arrays import F32
from runtime.block_transformer import SharedBlocks
from runtime.engine import Arrays, check_inputs
from wan22.block_layout import EMBEDDING
from wan22.component import Component
from wan22.precision import Number
from wan22.shapes import Profile
from wan22.specs import TEXT_TOKENS

BF16_IN_FLOAT32 = 16  # bits below those of bfloat16


class BlockTextEncoder:
    """It is an :class:`runtime.engine.Engine`."""

    def __init__(self, shared: SharedBlocks, component: Component, profiles: Sequence[Profile] = ()) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._shared, self._profiles = shared, profiles
        self._layer, self._norm = component.stage("layer"), component.stage("norm")
        self._stored = component.precision.wide.linears  # type of the embedding
        self._norm_weights: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._shared.enter()
        self._norm_weights = self._shared.end_weights(self.name, self._norm)
        return self

    def __exit__(self, *_: object) -> None:
        self._norm_weights = {}
        self._shared.leave()

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """The embeddings of a prompt; see :class:`runtime.engine.Engine`."""
        check_inputs(self.name, self.inputs, inputs, self._profiles)
        device, layout, rows = self._shared.device, self._shared.layout, self._embed(inputs["input_ids"][0])
        stream, _ = self._shared.stream_for(TEXT_TOKENS)
        stream.begin(self.name)
        x, other = device.put(rows), device.empty(self._layer.outputs[0], tokens=len(rows))
        for block in range(layout.blocks):
            with stream.block(self.name, block, self.name) as slot:
                device.run("layer", {"x": x}, {"x_out": other}, device.views(slot, layout.block))
            x, other = other, x
        embeddings = device.empty(self._norm.outputs[0], tokens=len(rows))
        device.run("norm", {"x": x}, {"embeddings": embeddings}, self._norm_weights)
        found: F32 = device.get(embeddings)
        stream.end()
        return found

    def _embed(self, ids: np.ndarray) -> F32:
        """The rows of the embedding for ``ids``, float32 ``[tokens, width]``."""
        (table,) = (place for place in self._shared.layout.ends if place.name == EMBEDDING)
        count, row_bytes = table.shape[0], table.size_bytes // table.shape[0]
        if ids.min() < 0 or ids.max() >= count:
            raise ValueError(f"token {ids.min()} to {ids.max()}, the table has {count}")
        device = self._shared.device
        starts = (table.offset + int(index) * row_bytes for index in ids)
        rows = np.stack([device.host_bytes(self.name, start, row_bytes) for start in starts])
        if self._stored is Number.BF16:
            return (rows.view(np.uint16).astype(np.uint32) << BF16_IN_FLOAT32).view(np.float32)
        return rows.view(np.float16 if self._stored is Number.FP16 else np.float32).astype(np.float32)
