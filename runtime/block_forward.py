"""One forward of a transformer in stages: the arrays between stages, slices of tokens, and what FP8 attention needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from runtime.block_stream import Transfers
from runtime.group import Link
from wan22.block_layout import Overlay, Place
from wan22.component import BY_HEAD, Stage, Tensor
from wan22.parallel import shares
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
    """The arrays of one forward. Stages that take slices run once for each.

    With a ``link``, its members divide the tokens: each has ``tokens`` of its own in all stages but "attend", which
    takes the tokens of all with a part of the heads. "join" follows it, on all of the own tokens.
    """

    def __init__(
        self,
        device: StageDevice,
        stages: Mapping[str, Stage],
        tokens: int,
        slices: int,
        given: Mapping[str, Any],
        whole: tuple[Link, int] | None = None,
    ) -> None:
        """``whole`` is the link, and the number of tokens of all its members."""
        self._device, self._stages, self._given, self._tokens = device, stages, given, tokens
        self._link = whole[0] if whole else None
        self._shares = shares(whole[1], whole[0].size) if whole else [slice(0, tokens)]
        size = -(-tokens // slices)
        self._cuts = [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
        self._kept: dict[str, Any] = {}

    def block(self, block: int, x: Any, text: Mapping[str, Any], weights: Weights) -> Any:
        """``x`` behind a block; the array of the block before last is used again."""
        scales = {name: self._given[name][block] for name in ("k_center", "v_scale") if name in self._given}
        qkv = self.in_slices("qkv", {"x": x, **scales}, weights)
        if self._link is not None:
            qkv = {name: self._of_all_tokens(name, array) for name, array in qkv.items()}
        attended = self._arrays("attend", self._shares[-1].stop)
        self._device.run("attend", self._entering("attend", qkv | scales), attended, weights)
        if self._link is not None:
            attended = self._joined(attended[BY_HEAD], scales, weights)
        inputs = {"x": x, **attended, **text, **scales}
        if len(self._cuts) > 1:
            self._replace_by_slices(x, inputs, weights)
            return x
        made = self.in_slices("rest", inputs, weights)["x_out"]
        self._kept["x_out"] = x
        return made

    def _of_all_tokens(self, name: str, messages: Any) -> Any:
        """Exchange ``[groups, positions, heads, head]`` of own tokens for own heads of all tokens."""
        assert self._link is not None
        (tensor,) = (tensor for tensor in self._stages["attend"].inputs if tensor.name == name)
        tokens = self._shares[-1].stop
        every = self._array(f"every {name}", tensor, tokens)
        sends = [messages[peer] for peer in range(self._link.size)]
        self._link.all_to_all(sends, [every[rows] for rows in self._shares])
        return every

    def _joined(self, o: Any, scales: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """Exchange ``[own heads, all tokens, head]`` for ``[heads, own tokens, head]``; the rows of these."""
        assert self._link is not None
        (tensor,) = (tensor for tensor in self._stages["join"].inputs if tensor.name == BY_HEAD)
        own, count = self._array("own o", tensor, self._tokens), len(o)
        receives = [own[peer * count :][:count] for peer in range(self._link.size)]
        self._link.all_to_all([o[:, rows] for rows in self._shares], receives, pieces=count)
        joined = self._arrays("join", self._tokens)
        self._device.run("join", self._entering("join", {BY_HEAD: own, **scales}), joined, weights)
        return joined

    def _entering(self, stage: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``arrays`` that ``stage`` takes."""
        needed = {tensor.name for tensor in self._stages[stage].inputs}
        return {name: array for name, array in arrays.items() if name in needed}

    def gathered(self, name: str, part: Any) -> Any:
        """The rows of all members, each of which has ``part`` of the output ``name`` of "velocity"."""
        if self._link is None:
            return part
        (tensor,) = (tensor for tensor in self._stages["velocity"].outputs if tensor.name == name)
        every = self._array(f"every {name}", tensor, self._shares[-1].stop)
        self._link.all_gather(part, [every[rows] for rows in self._shares])
        return every

    def _replace_by_slices(self, x: Any, inputs: Mapping[str, Any], weights: Weights) -> None:
        """Overwrite ``x`` with the output of ``rest``, through an array of one slice."""
        (tensor,), size = self._stages["rest"].outputs, self._cuts[0].stop
        for rows in self._cuts:
            part = self._array("slice", tensor, size)[: rows.stop - rows.start]
            self._run_cut("rest", rows, inputs, {tensor.name: part}, weights)
            self._device.move(part, x[rows])

    def in_slices(self, name: str, inputs: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """The outputs of stage ``name`` for all tokens; inputs and outputs with an axis of tokens are cut."""
        outputs, tensors = self._arrays(name, self._tokens), self._stages[name].outputs
        for rows in self._cuts:
            made = {tensor.name: self._part(tensor, outputs[tensor.name], rows) for tensor in tensors}
            self._run_cut(name, rows, inputs, made, weights)
            for tensor in tensors:
                if self._is_by_group(tensor):
                    self._device.move(made[tensor.name], outputs[tensor.name][:, rows])
        return outputs

    def _run_cut(
        self, name: str, rows: slice, inputs: Mapping[str, Any], made: Mapping[str, Any], weights: Weights
    ) -> None:
        """Run stage ``name`` for the tokens ``rows`` into ``made``, with the rows' part of every input of tokens."""
        given = {}
        for tensor in self._stages[name].inputs:
            array = inputs.get(tensor.name, self._given.get(tensor.name))
            given[tensor.name] = array[rows] if _is_own(tensor.dims[0]) else array
        self._device.run(name, given, made, weights)

    def _is_by_group(self, tensor: Tensor) -> bool:
        """True if slices of ``tensor`` are not contiguous, so that they are copied."""
        return any(map(_is_own, tensor.dims[1:])) and len(self._cuts) > 1

    def _part(self, tensor: Tensor, output: Any, rows: slice) -> Any:
        """The ``rows`` of ``output``, an array of their own if those are not contiguous, or all of it."""
        if self._is_by_group(tensor):
            size = rows.stop - rows.start
            return self._array(f"part of {tensor.name}, {size}", tensor, size)
        return output[rows] if _is_own(tensor.dims[0]) else output

    def _arrays(self, stage: str, positions: int) -> dict[str, Any]:
        """Arrays for the outputs of ``stage``, the same in every block."""
        tensors = self._stages[stage].outputs
        return {tensor.name: self._array(tensor.name, tensor, positions) for tensor in tensors}

    def _array(self, name: str, tensor: Tensor, rows: int) -> Any:
        """The array called ``name``, made at its first use; its only dimension of an unknown size is ``rows`` long."""
        if name not in self._kept:
            named = [dim for dim in tensor.dims if isinstance(dim, str)]
            self._kept[name] = self._device.empty(tensor, **dict.fromkeys(named, rows))
        return self._kept[name]


def _is_own(dim: int | str) -> bool:
    """True for the dimension of the tokens of this device."""
    return str(dim).startswith("positions")


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
