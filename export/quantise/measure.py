"""Measure the inputs of an expert's linears, while its weights stream past: on noise, or on parts of recorded forwards.

One forward over small videos, each at a timestep of its own. Each matrix is in memory once, in float32, so the largest
one bounds the memory. Without data the videos are noise, without text. On a small model with the real one's outliers,
means and factors measured so do nearly as well as those of a run with another prompt (docs/figures.md): outliers are a
property of the weights.

Matrices that are rounded for rows of inputs gain far more by those of prompts: the parts of forwards that
``wan-trt calibrate`` keeps.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from export.files.tensor_file import BFLOAT16, Array, as_torch, check_finite
from export.graphs.linear import kind_of
from export.graphs.taps import Forwards
from export.quantise.inputs import CENTRED, MeasuredInput, input_width, smoothing_factors
from wan22.parts import DitSpec, rope_split
from wan22.progress import Progress, silent
from wan22.specs import PATCH, TEXT_TOKENS, TRAIN_TIMESTEPS, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

TIMESTEPS = 2  # of an expert
GRID = (2, 8, 8)  # frames, rows and columns of tokens at each
GRID_FOR_FP4 = (2, 16, 16)  # whose rounding needs rows; means and factors gain nothing by more of them
MOST_ROWS = 1024  # that are kept of an input
SEED = 0
THETA = 10000.0  # of sinusoid and rotary embedding (wan22.md §2.2, §2.3)
NEARLY_EQUAL = 1e-4  # rows that differ by less than this share of their mean tell nothing of a channel's spread

Read = Callable[[str], Array]


def measure_inputs(
    read: Read,
    spec: ModelSpec,
    expert: str,
    progress: Progress = silent,
    blocks: tuple[int, int] = (0, 0),
    keep: Collection[str] = (),
    given: Forwards | None = None,
) -> dict[str, MeasuredInput]:
    """The inputs of the linears in the blocks of ``expert``, by linear ("blocks.0.ffn.2"; q stands for q, k and v).

    Args:
        read: reads a tensor by its official name, in any floating type.
        spec: the model.
        expert: its name.
        progress: called after every block.
        blocks: of other experts measured before, and of all experts.
        keep: kinds of linears ("ffn.2") whose inputs are kept.
        given: parts of forwards to measure instead of noise.

    Raises:
        UserError: the weights make NaN or infinity.
    """
    forward = _Forward(read, spec.dit, given or forwards_of_noise(spec, expert), keep)
    for block in range(spec.dit.layers):
        forward.block(f"blocks.{block}")
        progress("measure inputs", blocks[0] + block + 1, blocks[1] or spec.dit.layers, "blocks")
    return forward.found


def inputs_of_zeros(dit: DitSpec) -> dict[str, MeasuredInput]:
    """The inputs in a model of zeros, whose weights are holes in a file."""
    linears = (f"blocks.{block}.{kind}" for block in range(dit.layers) for kind in CENTRED)
    widths = {linear: input_width(dit, linear) for linear in linears}
    return {n: MeasuredInput(np.zeros(w, np.float32), np.ones(w, np.float32)) for n, w in widths.items()}


def forwards_of_noise(spec: ModelSpec, expert: str, grid: tuple[int, int, int] = GRID) -> Forwards:
    """One forward at every one of :func:`timesteps_of`, over ``grid`` tokens of noise, without text."""
    dit, random, timesteps = spec.dit, np.random.default_rng(SEED), timesteps_of(spec, expert)
    (frames, rows, columns), runs = grid, len(timesteps)
    size = (runs, dit.out_channels, frames, rows * PATCH[1], columns * PATCH[2])
    video = np.repeat(random.standard_normal((1, *size[1:]), np.float32), runs, 0)
    condition = np.zeros((runs, dit.condition_channels, *size[2:]), np.float32)
    text = np.zeros((1, 1, dit.text_width), np.float32)
    features = _sinusoid(timesteps, dit.freq_width)
    return Forwards(np.concatenate([video, condition], 1), features, text)


def timesteps_of(spec: ModelSpec, expert: str) -> tuple[float, ...]:
    """The timesteps after a quarter and three quarters of the steps that ``expert`` makes of a usual run.

    Steps are even in the noise level before it is shifted (wan22.md §5.2), so most of them are at high noise.
    """
    shift, boundary = spec.sampling.shift, spec.sampling.boundary or 0.0
    unshifted = boundary / (shift - (shift - 1) * boundary)
    first, last = {"high_noise": (1.0, unshifted), "low_noise": (unshifted, 0.0)}.get(expert, (1.0, 0.0))
    levels = (first + (part + 0.5) / TIMESTEPS * (last - first) for part in range(TIMESTEPS))
    return tuple(_shifted(level, shift) for level in levels)


def _shifted(level: float, shift: float) -> float:
    return TRAIN_TIMESTEPS * shift * level / (1 + (shift - 1) * level)


class _Forward:
    """Forwards in float32, block by block; the tokens of all runs are the rows of one matrix ``[runs * tokens, D]``."""

    def __init__(self, read: Read, dit: DitSpec, forwards: Forwards, keep: Collection[str]) -> None:
        import torch
        from torch.nn import functional

        self.read, self.dit, self.runs, self.keep = read, dit, len(forwards.video), keep
        self.found: dict[str, MeasuredInput] = {}
        patches = self.tensor("patch_embedding.weight"), self.tensor("patch_embedding.bias"), PATCH
        self.x = functional.conv3d(torch.from_numpy(forwards.video), *patches).flatten(2).transpose(1, 2).flatten(0, 1)
        time = self.plain(torch.from_numpy(forwards.time_features), "time_embedding.0")
        time = self.plain(functional.silu(time), "time_embedding.2")
        self.modulation = self.plain(functional.silu(time), "time_projection.1").view(self.runs, 6, dit.width)
        text = functional.pad(torch.from_numpy(forwards.text), (0, 0, 0, TEXT_TOKENS - forwards.text.shape[1]))
        text = self.plain(functional.gelu(self.plain(text, "text_embedding.0"), approximate="tanh"), "text_embedding.2")
        self.texts, self.text = len(text), text.flatten(0, 1)  # [texts * 512, D]
        angles = torch.from_numpy(_angles(dit.head_width, forwards.grid))
        self.rotation = torch.polar(torch.ones_like(angles), angles)[:, None]  # [tokens, 1, head/2]

    def tensor(self, key: str) -> "Tensor":
        tensor: Tensor = as_torch(self.read(key)).float()
        return tensor

    def plain(self, x: "Tensor", key: str) -> "Tensor":
        from torch.nn import functional

        return functional.linear(x, self.tensor(f"{key}.weight"), self.tensor(f"{key}.bias"))

    def linears(self, x: "Tensor", key: str, parts: str) -> "Iterator[Tensor]":
        """``x`` through the linears ``parts`` of ``key``, and the record of their input under the first."""
        import torch
        from torch.nn import functional

        columns = torch.zeros(x.shape[1])
        for part in parts:
            weight = self.tensor(f"{key}.{part}.weight")
            smallest, largest = torch.aminmax(weight, dim=0)
            columns = torch.maximum(columns, torch.maximum(-smallest, largest))
            yield functional.linear(x, weight, self.tensor(f"{key}.{part}.bias"))
            del weight
        linear = f"{key}.{parts[0]}"
        tells = x is not self.text or self.texts > 1  # without text all its rows are equal
        kept = x[:: -(-len(x) // MOST_ROWS)].numpy() if tells and kind_of(linear) in self.keep else None
        if kind_of(linear) in CENTRED:
            self.found[linear] = _measured(linear, x, columns)
        elif kept is not None:
            self.found[linear] = MeasuredInput(np.zeros(x.shape[1], np.float32))
        if kept is not None:
            self.found[linear] = replace(self.found[linear], rows=_on_disk(kept))

    def block(self, key: str) -> None:
        """Replace ``x`` by the output of the block ``key``."""
        from torch.nn import functional

        dit, attention, cross = self.dit, f"{key}.self_attn", f"{key}.cross_attn"
        rows = self.modulation + self.tensor(f"{key}.modulation").view(1, 6, dit.width)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            row.repeat_interleave(len(self.x) // self.runs, 0) for row in rows.unbind(1)
        )
        x = self.x
        q, k, v = self.linears(self.norm(x) * (1 + scale) + shift, attention, "qkv")
        q, k = (self.rotate(self.head_norm(each, f"{attention}.norm_{n}")) for n, each in (("q", q), ("k", k)))
        (y,) = self.linears(self.attend(q, k, v, self.runs), attention, "o")
        x = x + y * gate
        affine = self.tensor(f"{key}.norm3.weight"), self.tensor(f"{key}.norm3.bias")
        (q,) = self.linears(functional.layer_norm(x, (dit.width,), *affine, dit.eps), cross, "q")
        k, v = self.linears(self.text, cross, "kv")
        q, k = self.head_norm(q, f"{cross}.norm_q"), self.head_norm(k, f"{cross}.norm_k")
        (y,) = self.linears(self.attend(q, k, v, self.texts), cross, "o")
        x = x + y
        (hidden,) = self.linears(self.norm(x) * (1 + ffn_scale) + ffn_shift, f"{key}.ffn", "0")
        (y,) = self.linears(functional.gelu(hidden, approximate="tanh"), f"{key}.ffn", "2")
        self.x = x + y * ffn_gate

    def attend(self, q: "Tensor", k: "Tensor", v: "Tensor", texts: int) -> "Tensor":
        """``[runs * tokens, D]``; ``k`` and ``v`` are those of ``texts`` runs, and a single one serves all."""
        from torch.nn import functional

        keys, values = (self.by_head(each, texts).expand(self.runs, -1, -1, -1) for each in (k, v))
        y = functional.scaled_dot_product_attention(self.by_head(q, self.runs), keys, values)
        return y.transpose(1, 2).reshape(q.shape)

    def norm(self, x: "Tensor") -> "Tensor":
        from torch.nn import functional

        return functional.layer_norm(x, (self.dit.width,), eps=self.dit.eps)

    def head_norm(self, x: "Tensor", key: str) -> "Tensor":
        from torch.nn import functional

        return functional.rms_norm(x, (self.dit.width,), self.tensor(f"{key}.weight"), self.dit.eps)

    def rotate(self, x: "Tensor") -> "Tensor":
        import torch

        pairs = torch.view_as_complex(x.view(self.runs, -1, self.dit.heads, self.dit.head_width // 2, 2))
        return torch.view_as_real(pairs * self.rotation).reshape(x.shape)

    def by_head(self, x: "Tensor", runs: int) -> "Tensor":
        """``[runs * tokens, D] → [runs, heads, tokens, head]``."""
        return x.view(runs, -1, self.dit.heads, self.dit.head_width).transpose(1, 2)


def _measured(key: str, x: "Tensor", columns: "Tensor") -> MeasuredInput:
    """The record of the input ``x [rows, in]`` of a matrix with the column maxima ``columns [in]``."""
    mean = x.mean(0)
    check_finite(f"{key}: its input", mean.numpy())
    centred = x - mean
    largest = centred.abs().amax(0)
    if float(largest.max()) <= NEARLY_EQUAL * float(mean.abs().max()):
        return MeasuredInput(mean.numpy(), np.ones(len(mean), np.float32))
    factor = smoothing_factors(largest.numpy(), columns.numpy())
    return MeasuredInput(mean.numpy(), factor, crest_of((centred * as_torch(factor)).numpy()))


def _on_disk(rows: Array) -> Array:
    """``rows`` in bfloat16 in a file without a name, which goes with the array: those of a model take gigabytes."""
    with TemporaryFile() as file:
        file.write(rows.astype(BFLOAT16).tobytes())
        file.flush()
        return np.memmap(file, BFLOAT16, "r", shape=rows.shape)


def crest_of(rows: Array) -> float:
    """The crest of ``rows [rows, in]`` together: what INT8 with a scale per row costs is this over 440."""
    squares = np.square(np.asarray(rows, np.float64))
    return float(np.sqrt(squares.max(1).sum() / squares.mean(1).sum()))


def _sinusoid(timesteps: Sequence[float], width: int) -> Array:
    """``[timesteps, width]``, cosines first."""
    half = width // 2
    angles = np.outer(np.asarray(timesteps, np.float64), THETA ** (-np.arange(half) / half))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _angles(head_width: int, grid: tuple[int, int, int]) -> Array:
    """The rotation of every pair of a head at every token of the grid: ``[tokens, head/2]``."""
    places = np.indices(grid).reshape(len(grid), -1)
    axes = zip(places, rope_split(head_width), strict=True)
    return np.concatenate([np.outer(place, THETA ** (-np.arange(n) / n)) for place, n in axes], 1).astype(np.float32)
