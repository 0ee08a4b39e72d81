"""One forward of a transformer in stages: the arrays between stages, slices of tokens, and what FP8 attention needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from runtime.block_stream import Transfers
from wan22.block_layout import Overlay, Place
from wan22.bundle import Stage, Tensor
from wan22.specs import PATCH

LARGEST_QUANTISED = 440.0  # of FP8's 448, so that rounding cannot overflow
SMALLEST = 1e-6  # keeps the scale of a channel of zeros positive
Weights = Mapping[str, Any]


class StageDevice(Transfers, Protocol):
    """Where stages run and weights stream to: :mod:`runtime.blocks_onnxruntime` in host memory."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], weights: Weights) -> None:
        """Enqueue stage ``name`` with contiguous arrays."""

    def empty(self, tensor: Tensor, **sizes: int) -> Any:
        """A new array for ``tensor``; ``sizes`` are those of its named dimensions."""

    def views(self, memory: Any, places: Sequence[Place]) -> dict[str, Any]:
        """The weights at ``places`` of ``memory``."""

    def read(self, expert: str, offset: int, size_bytes: int) -> Any:
        """A part of the weights of ``expert``, in memory of its own."""

    def host_bytes(self, expert: str, offset: int, size_bytes: int) -> np.ndarray:
        """A part of the weights of ``expert`` in host memory."""

    def use(self, expert: str, overlay: tuple[Path, Overlay] | None) -> None:
        """Replace parts of the weights of ``expert`` from now on, once all copies before are done."""

    def move(self, source: Any, target: Any) -> None:
        """Enqueue a copy from one array to another of the same shape."""

    def put(self, array: np.ndarray) -> Any:
        """``array`` on the device."""

    def get(self, array: Any) -> np.ndarray:
        """``array`` in host memory, once all computations before are done."""


class BlockForward:
    """The arrays of one forward. Stages that take slices run once for each."""

    def __init__(
        self, device: StageDevice, stages: Mapping[str, Stage], tokens: int, slices: int, given: Mapping[str, Any]
    ) -> None:
        self._device, self._stages, self._given, self._tokens = device, stages, given, tokens
        size = -(-tokens // slices)
        self._cuts = [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
        self._kept: dict[str, Any] = {}

    def block(self, block: int, x: Any, text: Mapping[str, Any], weights: Weights) -> Any:
        """``x`` behind a block; the array of the block before last is used again."""
        scales = {name: self._given[name][block] for name in ("k_center", "v_scale") if name in self._given}
        qkv = self.in_slices("qkv", {"x": x, **scales}, weights)
        attended = self._arrays("attend")
        needed = {tensor.name for tensor in self._stages["attend"].inputs}
        entering = {name: array for name, array in (qkv | scales).items() if name in needed}
        self._device.run("attend", entering, attended, weights)
        inputs = {"x": x, **attended, **text}
        if len(self._cuts) > 1:
            self._replace_by_slices(x, inputs, weights)
            return x
        made = self.in_slices("rest", inputs, weights)["x_out"]
        self._kept["x_out"] = x
        return made

    def _replace_by_slices(self, x: Any, inputs: Mapping[str, Any], weights: Weights) -> None:
        """Overwrite ``x`` with the output of ``rest``, through an array of one slice."""
        (tensor,), size = self._stages["rest"].outputs, self._cuts[0].stop
        if "slice" not in self._kept:
            self._kept["slice"] = self._device.empty(tensor, positions=size)
        for rows in self._cuts:
            part = self._kept["slice"][: rows.stop - rows.start]
            self._run_cut("rest", rows, inputs, {tensor.name: part}, weights)
            self._device.move(part, x[rows])

    def in_slices(self, name: str, inputs: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """The outputs of stage ``name`` for all tokens; inputs and outputs with an axis of tokens are cut."""
        outputs = self._arrays(name)
        cut = {tensor.name for tensor in self._stages[name].outputs if tensor.dims[0] == "positions"}
        for rows in self._cuts:
            made = {key: array[rows] if key in cut else array for key, array in outputs.items()}
            self._run_cut(name, rows, inputs, made, weights)
        return outputs

    def _run_cut(
        self, name: str, rows: slice, inputs: Mapping[str, Any], made: Mapping[str, Any], weights: Weights
    ) -> None:
        """Run stage ``name`` for the tokens ``rows`` into ``made``, with the rows' part of every input of tokens."""
        given = {}
        for tensor in self._stages[name].inputs:
            array = inputs.get(tensor.name, self._given.get(tensor.name))
            given[tensor.name] = array[rows] if tensor.dims[0] == "positions" else array
        self._device.run(name, given, made, weights)

    def _arrays(self, stage: str) -> dict[str, Any]:
        """Arrays for the outputs of ``stage``, the same in every block."""
        for tensor in self._stages[stage].outputs:
            if tensor.name not in self._kept:
                self._kept[tensor.name] = self._device.empty(tensor, positions=self._tokens)
        return {tensor.name: self._kept[tensor.name] for tensor in self._stages[stage].outputs}


def fp8_scales(
    norms: np.ndarray, tables: np.ndarray, modulation: np.ndarray, means: np.ndarray
) -> dict[str, np.ndarray]:
    """``v_scale`` and ``k_center`` of FP8 attention for every block, ``[blocks, 1, D]``.

    ``|v| <= |row of V's matrix| · (sqrt(D) · max|1 + scale| + |shift - mean|)`` by Cauchy and Schwarz: tokens are
    normed to ``sqrt(D)``, modulated, and lose the mean. It only must not overflow. Softmax ignores any vector
    subtracted from K, so zeros do.

    Args:
        norms: of the rows of V's matrix, ``[blocks, D]``.
        tables: modulation of the blocks, ``[blocks, 6·D]``.
        modulation: of the time rows, ``[time rows, 6·D]``.
        means: that are subtracted from the input of V, ``[blocks, D]``; zeros if none are.
    """
    width = norms.shape[1]
    shift, scale = np.split((tables[:, None] + modulation)[..., : 2 * width], 2, axis=-1)  # [blocks, time rows, D]
    longest = np.sqrt(width) * np.abs(1 + scale).max(-1) + np.linalg.norm(shift - means[:, None], axis=-1)
    bound = norms * longest.max(1, keepdims=True)
    v_scale = (np.maximum(bound, SMALLEST) / LARGEST_QUANTISED).astype(np.float32)[:, None]
    return {"v_scale": v_scale, "k_center": np.zeros_like(v_scale)}


def patchify(video: np.ndarray) -> np.ndarray:
    """``[C, T, h, w]`` → patches ``[tokens, 4·C]``, channels slowest."""
    channels, frames, height, width = video.shape
    grid = video.reshape(channels, frames, height // PATCH[1], PATCH[1], width // PATCH[2], PATCH[2])
    return np.ascontiguousarray(grid.transpose(1, 2, 4, 0, 3, 5)).reshape(-1, channels * PATCH[1] * PATCH[2])


def unpatchify(patches: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Patches ``[tokens, 4·z]``, channels fastest → ``shape``, ``[1, z, T, h, w]``."""
    _, channels, frames, height, width = shape
    grid = patches.reshape(frames, height // PATCH[1], width // PATCH[2], PATCH[1], PATCH[2], channels)
    return np.ascontiguousarray(grid.transpose(5, 0, 1, 3, 2, 4)).reshape(shape)
