"""Measure the inputs of an expert's linears without any data, while its weights stream past.

One forward over a small video of noise, without text, at two timesteps of the expert. Each matrix is in memory once, in
float32, so the largest one bounds the memory. On a small model with the real one's outliers, means and factors measured
so do as well as those of a run with another prompt (docs/figures.md): outliers are a property of the weights.

Without text all rows that cross-attention reads are equal, and so is every row of its result, whatever the queries.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from export.files.tensor_file import BFLOAT16, Array, as_torch, check_finite
from export.quantise.inputs import CENTRED, MeasuredInput, input_width, smoothing_factors
from wan22.parts import DitSpec, rope_split
from wan22.progress import Progress, silent
from wan22.specs import PATCH, TRAIN_TIMESTEPS, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

GRID = (2, 8, 8)  # frames, rows and columns of tokens
GRID_OF_ROWS = (2, 16, 16)  # where rows are kept: NVFP4 gains by more of them, means and factors do not
SEED = 0
THETA = 10000.0  # of sinusoid and rotary embedding (wan22.md §2.2, §2.3)
NEARLY_EQUAL = 1e-4  # rows that differ by less than this share of their mean tell nothing of a channel's spread

Read = Callable[[str], Array]


def measure_inputs(
    read: Read,
    spec: ModelSpec,
    expert: str,
    progress: Progress = silent,
    done: int = 0,
    total: int = 0,
    keep: Collection[str] = (),
) -> dict[str, MeasuredInput]:
    """The inputs of the linears in the blocks of ``expert``, by linear ("blocks.0.ffn.2"; q stands for q, k and v).

    Args:
        read: reads a tensor by its official name, in any floating type.
        spec: the model.
        expert: its name.
        progress: called after every block.
        done: blocks of other experts measured before.
        total: blocks of all experts.
        keep: kinds of linears ("ffn.2") whose inputs are kept.

    Raises:
        UserError: the weights make NaN or infinity.
    """
    forward = _Forward(read, spec.dit, timesteps_of(spec, expert), keep)
    for block in range(spec.dit.layers):
        forward.block(f"blocks.{block}")
        progress("measure inputs", done + block + 1, total or spec.dit.layers, "blocks")
    return forward.found


def inputs_of_zeros(dit: DitSpec) -> dict[str, MeasuredInput]:
    """The inputs in a model of zeros, whose weights are holes in a file."""
    linears = (f"blocks.{block}.{kind}" for block in range(dit.layers) for kind in CENTRED)
    widths = {linear: input_width(dit, linear) for linear in linears}
    return {n: MeasuredInput(np.zeros(w, np.float32), np.ones(w, np.float32)) for n, w in widths.items()}


def timesteps_of(spec: ModelSpec, expert: str) -> tuple[float, float]:
    """The timesteps after a quarter and three quarters of the steps that ``expert`` makes of a usual run.

    Steps are even in the noise level before it is shifted (wan22.md §5.2), so most of them are at high noise.
    """
    shift, boundary = spec.sampling.shift, spec.sampling.boundary or 0.0
    unshifted = boundary / (shift - (shift - 1) * boundary)
    first, last = {"high_noise": (1.0, unshifted), "low_noise": (unshifted, 0.0)}.get(expert, (1.0, 0.0))
    early, late = (first + share * (last - first) for share in (0.25, 0.75))
    return _shifted(early, shift), _shifted(late, shift)


def _shifted(level: float, shift: float) -> float:
    return TRAIN_TIMESTEPS * shift * level / (1 + (shift - 1) * level)


class _Forward:
    """A forward in float32, block by block; the rows of all ``timesteps`` are one matrix ``[runs * tokens, D]``."""

    def __init__(self, read: Read, dit: DitSpec, timesteps: Sequence[float], keep: Collection[str]) -> None:
        import torch
        from torch.nn import functional

        self.read, self.dit, self.runs, self.keep = read, dit, len(timesteps), keep
        self.found: dict[str, MeasuredInput] = {}
        random = np.random.default_rng(SEED)
        self.grid = GRID_OF_ROWS if keep else GRID
        frames, rows, columns = self.grid
        size = (1, dit.out_channels, frames, rows * PATCH[1], columns * PATCH[2])
        video = torch.from_numpy(random.standard_normal(size, np.float32))
        if dit.condition_channels:
            video = torch.cat([video, torch.zeros(1, dit.condition_channels, *size[2:])], 1)
        x = functional.conv3d(video, self.tensor("patch_embedding.weight"), self.tensor("patch_embedding.bias"), PATCH)
        self.x = x.flatten(2)[0].T.repeat(self.runs, 1)
        features = torch.from_numpy(_sinusoid(timesteps, dit.freq_width))
        time = self.plain(functional.silu(self.plain(features, "time_embedding.0")), "time_embedding.2")
        self.modulation = self.plain(functional.silu(time), "time_projection.1").view(self.runs, 6, dit.width)
        text = self.plain(torch.zeros(1, dit.text_width), "text_embedding.0")
        self.context = self.plain(functional.gelu(text, approximate="tanh"), "text_embedding.2")
        angles = torch.from_numpy(_angles(dit.head_width, self.grid))
        self.rotation = torch.polar(torch.ones_like(angles), angles)[:, None]  # [tokens, 1, head/2]

    def tensor(self, key: str) -> "Tensor":
        tensor: Tensor = as_torch(self.read(key)).float()
        return tensor

    def plain(self, x: "Tensor", key: str) -> "Tensor":
        from torch.nn import functional

        return functional.linear(x, self.tensor(f"{key}.weight"), self.tensor(f"{key}.bias"))

    def linears(self, x: "Tensor", key: str, parts: str, *, computed: bool = True) -> "Iterator[Tensor]":
        """``x`` through the linears ``parts`` of ``key``, and the record of their input under the first."""
        import torch
        from torch.nn import functional

        columns = torch.zeros(x.shape[1])
        for part in parts:
            weight = self.tensor(f"{key}.{part}.weight")
            smallest, largest = torch.aminmax(weight, dim=0)
            columns = torch.maximum(columns, torch.maximum(-smallest, largest))
            if computed:
                yield functional.linear(x, weight, self.tensor(f"{key}.{part}.bias"))
            del weight
        linear = f"{key}.{parts[0]}"
        self.found[linear] = _measured(linear, x, columns)
        if linear.split(".", 2)[2] in self.keep:
            self.found[linear] = replace(self.found[linear], rows=_on_disk(x.numpy()))

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
        attended = functional.scaled_dot_product_attention(self.by_head(q), self.by_head(k), self.by_head(v))
        (y,) = self.linears(attended.transpose(1, 2).reshape(x.shape), attention, "o")
        x = x + y * gate
        affine = self.tensor(f"{key}.norm3.weight"), self.tensor(f"{key}.norm3.bias")
        for _ in self.linears(functional.layer_norm(x, (dit.width,), *affine, dit.eps), cross, "q", computed=False):
            pass
        (y,) = self.linears(self.plain(self.context, f"{cross}.v"), cross, "o")
        x = x + y
        (hidden,) = self.linears(self.norm(x) * (1 + ffn_scale) + ffn_shift, f"{key}.ffn", "0")
        (y,) = self.linears(functional.gelu(hidden, approximate="tanh"), f"{key}.ffn", "2")
        self.x = x + y * ffn_gate

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

    def by_head(self, x: "Tensor") -> "Tensor":
        """``[runs * tokens, D] → [runs, heads, tokens, head]``."""
        return x.view(self.runs, -1, self.dit.heads, self.dit.head_width).transpose(1, 2)


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
