"""The report behind ``wan-trt inspect``: one engine's compiled kernels, counted, with estimated times on a target.

Times are rooflines: the larger of FLOPs over the dense peak of the operands' type and bytes over the bandwidth. They
are lower bounds that show which kernels matter, not measurements.
"""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engines.inspect.log import Compiled, Kernel
from engines.targets import Target
from wan22.precision import Number, Precision
from wan22.quantities import human_bytes

EVERY_BLOCK = "blocks.*"  # the block of a stage's kernels
OF_A_BLOCK = ("text_kv", "qkv", "attend", "join", "rest", "layer")  # stages that every block calls
NARROW = ("fp8", "int8", "fp4", "nvfp4")  # types of quantised products
SLOW_UNFUSED_BYTES = 2**26  # smaller copies are not reported
FEW_TOKENS = 1024  # as many as a rank, or groups of inputs with a scale of their own, may be


@dataclass(frozen=True)
class FusionReport:
    component: str
    target: Target
    compiled: Compiled
    precision: Precision
    weights: str = ""  # "embedded" or "in a file"
    blocks_in_model: int = 0  # set if only some blocks were compiled, or one for all

    # -- counts

    @property
    def is_block(self) -> bool:
        """True for a stage that every block calls, such as ``dit.qkv``."""
        return self.component.rpartition(".")[2].partition("_of_")[0] in OF_A_BLOCK

    @cached_property
    def blocks(self) -> dict[str, list[Kernel]]:
        """Kernels by block, in order; "all blocks" and "" hold kernels that belong to no single block."""
        if self.is_block:
            return {EVERY_BLOCK: list(self.compiled.kernels)}
        found: dict[str, list[Kernel]] = {}
        for kernel in self.compiled.kernels:
            found.setdefault(kernel.block, []).append(kernel)
        return found

    @property
    def kernels_per_block(self) -> list[int]:
        return [len(kernels) for block, kernels in self.blocks.items() if block.startswith("blocks.")]

    def by_dtype(self, role: str) -> dict[str, int]:
        """The number of kernels of ``role`` by compute type."""
        return dict(Counter(kernel.dtype for kernel in self.compiled.kernels if kernel.role == role))

    @property
    def typical_block(self) -> list[Kernel]:
        """The kernels of a block in the middle, which shares no kernel with the first and last modules."""
        names = [name for name in self.blocks if name.startswith("blocks.")]
        return self.blocks[names[len(names) // 2]] if names else []

    # -- cost on the target

    def seconds(self, kernel: Kernel) -> float | None:
        """The roofline time; None if the target has no figures or a size is known only at run time."""
        if not self.target.bandwidth_gb_s or kernel.has_open_sizes:
            return None
        memory = kernel.size_bytes / (self.target.bandwidth_gb_s * 1e9)
        peak = self.target.peak_tflops(Number(kernel.dtype) if kernel.dtype in list(Number) else Number.FP32)
        return max(memory, kernel.flops / (peak * 1e12)) if peak else memory

    def total(self, kernels: Iterable[Kernel]) -> float:
        return sum(self.seconds(kernel) or 0.0 for kernel in kernels)

    @property
    def blocks_left_out(self) -> int:
        return max(0, self.blocks_in_model - len(self.kernels_per_block))

    # -- problems

    @cached_property
    def problems(self) -> list[str]:
        """Faults that make an engine slow or impossible to run, one line each."""
        squares, loose, widened = [], [], []
        has_biases = self.component.startswith("text_encoder")  # one for each pair of its few tokens
        tokens = 0 if has_biases else self.compiled.tokens or 0
        for kernel in self.compiled.kernels:
            for operand in kernel.outputs:  # a tokens x tokens matrix is the sign of unfused attention
                has_heads = len(operand.dims) > 2
                if tokens and operand.dims[-2:] == (tokens, tokens) and (has_heads or tokens >= FEW_TOKENS):
                    stored = f"{list(operand.dims)} {operand.dtype}, {human_bytes(operand.size_bytes)}"
                    squares.append(f"{kernel.name} writes tokens x tokens: {stored}")
            softmax = [node for node in kernel.nodes if node.endswith(("Softmax", "Attention"))]
            if softmax and kernel.role != "attention" and "Soft" in "".join(kernel.steps):
                loose.append(f"{softmax[0]} is not inside an attention kernel")
            quantised = any(node.rstrip("_0123456789").endswith("DequantizeLinear") for node in kernel.nodes)
            if quantised and kernel.role in ("gemm", "attention") and kernel.dtype not in NARROW:
                widened.append(f"{kernel.name} multiplies {kernel.dtype} instead of {self.precision.linears.upper()}")
        if self.compiled.tokens is None:  # the heads of the VAE's attention are too wide for any fused kernel
            loose = []
        return [*squares, *loose, *widened]

    @property
    def unfused(self) -> list[Kernel]:
        """Kernels that only move or convert data, at least ``SLOW_UNFUSED_BYTES`` of it."""
        return [k for k in self.compiled.kernels if k.role == "copy" and k.size_bytes >= SLOW_UNFUSED_BYTES]

    # -- plain data

    def summary(self) -> dict[str, Any]:
        """Counts of the compiled kernels and figures of the whole model; keys include units."""
        per_block, kernels, more = self.kernels_per_block, self.compiled.kernels, self.blocks_left_out
        return {
            "component": self.component,
            "target": self.target.name,
            "precision": str(self.precision),
            "weights": self.weights,
            "blocks_compiled": len(per_block),
            "blocks_left_out": more,
            "kernels": len(kernels),
            "kernels_per_block": statistics.median_high(per_block) if per_block else None,
            "gemms": self.by_dtype("gemm"),
            "gemms_per_block": sum(k.role == "gemm" for k in self.typical_block),
            "attention": self.by_dtype("attention"),
            "convolutions": self.by_dtype("convolution"),
            "elementwise": sum(k.role == "elementwise" for k in kernels),
            "copies": sum(k.role == "copy" for k in kernels),
            "copies_over_64_mib": [k.name for k in self.unfused],
            "tokens": self.compiled.tokens,
            "scratch_bytes": self.compiled.scratch_bytes,
            "weights_bytes": self.compiled.weights_bytes,
            "kernels_of_open_sizes": sum(k.has_open_sizes for k in kernels),
            "tflop": (sum(k.flops for k in kernels) + more * sum(k.flops for k in self.typical_block)) / 1e12,
            "roofline_s": self.total(kernels) + more * self.total(self.typical_block),
            "roofline_block_s": self.total(self.typical_block),
            "problems": self.problems,
        }

    def as_json(self) -> dict[str, Any]:
        """The summary and every kernel."""
        return self.summary() | {"all_kernels": [self._row(kernel) for kernel in self.compiled.kernels]}

    def _row(self, kernel: Kernel) -> dict[str, Any]:
        def describe(operands: Iterable[Any]) -> list[str]:
            return [f"{o.dtype}{list(o.dims)}" for o in operands]

        return {
            "name": kernel.name,
            "block": kernel.block,
            "role": kernel.role,
            "dtype": kernel.dtype,
            "inputs": describe(kernel.inputs),
            "constants": describe(kernel.constants),
            "outputs": describe(kernel.outputs),
            "nodes": list(kernel.nodes),
            "gflop": kernel.flops / 1e9,
            "bytes": kernel.size_bytes,
            "roofline_us": None if (seconds := self.seconds(kernel)) is None else seconds * 1e6,
        }
