"""Read the compiled kernels of a graph from the compiler's verbose log, each with its operands and graph nodes.

TensorRT prints the compiled kernels in a section ``Layers:`` (the engine inspector's one-line format is the same text),
with or without a GPU. So a build on any machine shows whether attention is one kernel, what runs in FP8 and whether a
tokens x tokens matrix is stored. Graph nodes carry module paths, which assign every kernel to a block.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

from wan22.errors import UserError

DTYPES = {
    "Float": ("fp32", 4), "BFloat16": ("bf16", 2), "Half": ("fp16", 2), "FP8": ("fp8", 1), "FP4": ("fp4", 0.5),
    "FP4E2M1": ("nvfp4", 0.5),
    "Int64": ("int64", 8), "Int32": ("int32", 4), "Int8": ("int8", 1), "UInt8": ("uint8", 1), "Bool": ("bool", 1),
}  # fmt: skip
BYTES: dict[str, float] = dict(DTYPES.values())
# Steps of a generated kernel that compute nothing: a kernel with no other steps moves or converts data.
MOVES = {"Tran", "Move", "Resh", "Slic", "Conc", "Cast", "Unsq", "Sque", "Expa", "Copy", "Iden"}
NO_KERNEL = {"shape_call", "dummy", "signal", "wait", "constant", "noop"}
BEFORE_BLOCKS = ("patch_embedding", "time_embedding", "time_projection")

Role = Literal["gemm", "attention", "convolution", "elementwise", "copy"]


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes; -1 is a size known only at run time."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> float:
        return prod(self.dims) * BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Kernel:
    name: str
    kind: str  # the compiler's: gemm, kgen (generated), runtime_fusion, correlation, ...
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: tuple[str, ...]  # their names in the ONNX graph

    @cached_property
    def steps(self) -> list[str]:
        """The steps of a generated kernel, in the compiler's abbreviations: ``["Cast", "Mul", "Mean"]``."""
        return re.findall(r"r?[A-Z][a-z0-9]*", self.name.split("_myl_")[-1].split("_")[0])

    @cached_property
    def role(self) -> Role:
        if "mha" in self.name:
            return "attention"
        if self.kind == "gemm" or (self.kind == "runtime_fusion" and "Fc" in self.name):
            return "gemm"
        if self.kind in ("correlation", "convolution", "conv"):
            return "convolution"
        return "copy" if self.steps and set(self.steps) <= MOVES else "elementwise"

    @property
    def dtype(self) -> str:
        """The type of its first operand, which for matrix products is the type they multiply."""
        operands = (*self.inputs, *self.constants, *self.outputs)
        return operands[0].dtype if operands else ""

    @cached_property
    def block(self) -> str:
        """``blocks.3``; "all blocks" for kernels merged across blocks, "" for kernels outside them.

        The last kernel of a block also starts the next one (residual addition and next normalisation); it counts for
        the block that it ends.
        """
        if any(node.startswith(BEFORE_BLOCKS) for node in self.nodes):
            return ""
        found = sorted({int(match[1]) for node in self.nodes if (match := re.match(r"blocks\.(\d+)/", node))})
        if not found:
            return ""
        together = found[-1] - found[0] == len(found) - 1 <= 1
        return f"blocks.{found[0]}" if together else "all blocks"

    @property
    def has_open_sizes(self) -> bool:
        """True if a size is known only at run time and does not follow from the inputs'."""
        return any(size < 0 for operand in (*self.inputs, *self.outputs) for size in operand.dims)

    @property
    def flops(self) -> float:
        """FLOPs of matrix multiplications, attention and convolutions.

        Other kernels are memory-bound and count 0, as do those with open sizes.
        """
        if self.has_open_sizes:
            return 0.0
        if self.role == "attention":
            q, k, v = (operand.dims for operand in self.inputs[:3])
            if {len(dims) for dims in (q, k, v)} == {3} and k[-1] == q[-1] and k[1] in q[:2]:  # [tokens, heads, head]
                return 4.0 * prod(q) * k[0]
            return 2.0 * prod(q[:-1]) * (prod(k[-2:]) + prod(v[-2:]))
        if self.role == "gemm":
            return 2.0 * prod(self.outputs[0].dims) * self.inputs[0].dims[-1]
        if self.role == "convolution" and self.constants:
            return 2.0 * prod(self.outputs[0].dims) * prod(self.constants[0].dims[1:])
        return 0.0

    @property
    def size_bytes(self) -> float:
        """Bytes read and written if every operand is transferred once."""
        operands = {o.name: o.size_bytes for o in (*self.inputs, *self.constants, *self.outputs)}
        return float(sum(operands.values()))


@dataclass(frozen=True)
class Compiled:
    """The kernels and memory of an engine's first profile; all sizes are at the profile's maximum."""

    kernels: tuple[Kernel, ...]
    scratch_bytes: int
    weights_bytes: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # inputs only

    @property
    def tokens(self) -> int | None:
        """The number of tokens of a transformer, whole or a stage of its blocks; None for other graphs."""
        grid = _token_grid(self.shapes)
        return prod(grid) if grid else None


def _token_grid(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Frames, rows and columns of tokens, their product for a stage of a block, or () for other graphs."""
    if "rope_cos" in shapes:
        return shapes["rope_cos"][:-1]
    return next((shapes[name][:1] for name in ("q", "x", "patches") if name in shapes), ())


def read_log(path: Path) -> Compiled:
    """Read the kernels from a builder's log.

    Raises:
        UserError: the file is missing, or its build did not finish.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise UserError(f"no builder log {path}", "the log next to the engine", "run wan-trt build again") from None
    return parse(text, str(path))


def parse(text: str, origin: str = "the log") -> Compiled:
    """Parse a builder's log or the output of the engine inspector.

    Raises:
        UserError: ``text`` lists no kernels, or in an unknown format.
    """
    _, found, section = text.rpartition("Layers:\n")
    if not found:
        raise UserError(f"{origin} lists no compiled kernels", "a successful build", "run wan-trt build again")
    lines, _, edges = section.partition("I/O Tensors:")
    shapes = _input_shapes(edges)
    first = _first_profile([line for line in lines.splitlines() if line.startswith("Name: ")])
    kernels = (_kernel(line, shapes) for line in first)
    return Compiled(
        tuple(kernel for kernel in kernels if kernel.kind not in NO_KERNEL),
        scratch_bytes=_largest(text, "Total Activation Memory"),
        weights_bytes=_largest(text, "Total Weights Memory"),
        shapes=shapes,
    )


def _largest(text: str, what: str) -> int:
    return max((int(n) for n in re.findall(rf"{what}: (\d+) bytes", text)), default=0)


def _input_shapes(edges: str) -> dict[str, tuple[int, ...]]:
    found = re.findall(r"Name: (\S+), IOMode: Input, .*?MaxShape: \[([\d,]*)\]", edges)
    return {name: tuple(int(size) for size in dims.split(",") if size) for name, dims in found}


def _first_profile(lines: list[str]) -> list[str]:
    """The lines of profile 0. Kernels carry their region's number; some lines of a region carry its profile."""
    regions = [match[1] if (match := re.search(r"_myl(\d+)_\d+,", line)) else "" for line in lines]
    later = {region for region, line in zip(regions, lines, strict=True) if re.search(r"\[profile [1-9]", line)}
    return [line for region, line in zip(regions, lines, strict=True) if region not in later or not region]


_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: ?(?P<nodes>.*)$"
)
_OPERAND = re.compile(r"Name: (.+?), Dimensions: \[([-\d,]*)\],.*?Datatype: (\w+)")


def _kernel(line: str, shapes: Mapping[str, tuple[int, ...]]) -> Kernel:
    match = _LAYER.match(line)
    if not match:
        raise UserError(f"log line {line[:80]!r}", "a kernel in the format of TensorRT 10.13 to 11", "report it")
    inputs, constants, outputs = (
        tuple(_operands(match[part] or "", shapes)) for part in ("inputs", "constants", "outputs")
    )
    nodes = tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: (.*?)(?: \[profile \d+\])?\]", match["nodes"])))
    return Kernel(match["name"], match["kind"], inputs, constants, outputs, nodes)


def _operands(text: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Operand]:
    for name, dims, dtype in _OPERAND.findall(text):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        yield Operand(name, _resolve(name, sizes, shapes), DTYPES.get(dtype, (dtype.lower(), 4))[0])


def _resolve(name: str, dims: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """``dims`` with run-time sizes replaced by the profile's maximum, if they can be derived from the inputs."""
    if len(shapes.get(name, ())) == len(dims):
        return shapes[name]
    sizes = iter(_unknown_sizes(dims, shapes))
    return tuple(next(sizes, -1) if size == -1 else size for size in dims)


def _unknown_sizes(dims: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The values of the -1 in ``dims``: in a transformer tokens, frames and tokens per frame, or the token grid."""
    grid, text, times = _token_grid(shapes), shapes.get("input_ids", ()), shapes.get("time_features", ())
    if not grid:
        return (text[-1],) * len(dims) if text else times[:1]
    if len(dims) == 5 and dims[0] == 1:  # a video [1, C, T, h, w] of latents, or of tokens after the patch embedding
        latents = shapes.get("latents", ())
        video = latents[2:] if latents and dims[1] < 4 * latents[1] else grid
        return tuple(size for dim, size in zip(dims[2:], video, strict=True) if dim == -1)
    if dims.count(-1) == 1:
        return (prod(grid),)
    if dims.count(-1) == 2:
        return (prod(grid), prod(grid)) if dims[-2:] == (-1, -1) else (grid[0], prod(grid[1:]))
    return grid
