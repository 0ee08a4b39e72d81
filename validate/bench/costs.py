"""The minimum cost of a piece of work: arithmetic, bytes, and the time that a target's peaks allow for them.

If the engines are graphs (ONNX Runtime), arithmetic is counted on the graphs; for compiled engines it is the model's
(:mod:`wan22.costs`). A transformer counts one step, without results that engines cache across steps. Bytes are those
that no implementation can avoid: weights, inputs and outputs of every call. Peaks of GPUs come from the table of
targets; peaks of a CPU are measured on a large matrix product and a large copy.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from time import process_time
from typing import Literal

import numpy as np

from engines.targets import target_named
from validate.bench.graph_flops import GraphFlops, graph_flops, stored_bytes
from validate.bench.machine import usable_cores
from validate.bench.work import DECODER, ENCODER, TEXT, Work, components_of
from wan22.bundle import Bundle
from wan22.costs import dit_flops, text_encoder_flops, vae_flops
from wan22.precision import Precision
from wan22.shapes import shape_of
from wan22.specs import PATCH, TEXT_TOKENS

MATRIX = 2048  # rows of the measured product: 50 MB of operands, beyond most caches
COPY_BYTES = 2**28
TRIES = 6

FlopSource = Literal["graph", "spec"]


@dataclass(frozen=True)
class Peak:
    """The peak rates of a machine."""

    flops_per_s: Mapping[Precision, float | None]  # matrix products, by precision of the operands
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Cost:
    flop: Mapping[Precision, float]  # by the precision that computes it
    bytes: float
    source: FlopSource = "spec"  # where ``flop`` comes from

    @property
    def total_flop(self) -> float:
        return sum(self.flop.values())

    def roofline_s(self, peak: Peak) -> float | None:
        """The shortest time that ``peak`` allows; None if it has no rate for a precision."""
        seconds = 0.0
        for precision, flop in self.flop.items():
            rate = peak.flops_per_s.get(precision)
            if not rate:
                return None
            seconds += flop / rate
        return max(seconds, self.bytes / peak.bytes_per_s)


def costs_of(work: Work, bundle: Bundle) -> dict[str, Cost]:
    """The cost of every piece."""
    return {piece: _cost(piece, work, bundle) for piece in work.pieces}


def _cost(piece: str, work: Work, bundle: Bundle) -> Cost:
    counted = _of_graphs(piece, work, bundle)
    flops = counted or _of_spec(piece, work)
    precision = bundle.component(components_of(piece, work)[0]).precision
    of_attention = precision.wide if precision.attention == precision.wide.attention else precision
    by_type = {precision: flops.with_weights}
    by_type[of_attention] = by_type.get(of_attention, 0.0) + flops.attention
    return Cost(by_type, _bytes(piece, work, bundle), "graph" if counted else "spec")


def _of_graphs(piece: str, work: Work, bundle: Bundle) -> GraphFlops | None:
    """The sum over all calls of ``piece``; None for compiled engines or nodes that cannot be counted."""
    if bundle.manifest.build is None or bundle.manifest.build.backend != "onnxruntime":
        return None
    total, sizes = GraphFlops(0.0, 0.0), _sizes(work)
    for name, count in _calls(piece, work):
        component = bundle.component(name)
        if component.in_stages:
            return None
        inputs = {tensor.name: shape_of(tensor, sizes) for tensor in component.inputs}
        kept_text_rows = min(work.token_ids.shape[1] + 1, TEXT_TOKENS)
        flops = graph_flops(bundle.path(component.graph), inputs, kept_text_rows)
        if flops is None:
            return None
        total = total.plus(flops, count)
        if component.halves:  # the first half is computed once per prompt instead of in every forward
            once = graph_flops(bundle.path(component.halves[0]), inputs, kept_text_rows)
            if once is None:
                return None
            total = total.plus(once, -count)
    return total


def _of_spec(piece: str, work: Work) -> GraphFlops:
    spec, (height, width) = work.spec, work.latents.shape[3:]
    if piece == TEXT:
        return GraphFlops(text_encoder_flops(spec.text_encoder, work.token_ids.shape[1]), 0.0)
    if piece in (ENCODER, DECODER):
        chunks = sum(count for _, count in _calls(piece, work))
        return GraphFlops(vae_flops(spec.vae, piece, (height, width), chunks), 0.0)
    flops = dit_flops(spec.dit, work.tokens)
    return GraphFlops(flops.linears, flops.self_attention + flops.cross_attention)


def _calls(piece: str, work: Work) -> list[tuple[str, int]]:
    """The graphs that ``piece`` runs, with the number of calls."""
    first, *later = components_of(piece, work)
    return [(first, 1), *((name, work.latents.shape[2] - 1) for name in later)]


def _bytes(piece: str, work: Work, bundle: Bundle) -> float:
    total, sizes = 0.0, _sizes(work)
    for name, count in _calls(piece, work):
        component = bundle.component(name)
        tensors = (*component.inputs, *component.outputs)
        edges = sum(math.prod(shape_of(tensor, sizes)) * np.dtype(tensor.dtype).itemsize for tensor in tensors)
        if component.halves:
            weights = stored_bytes(bundle.path(component.halves[1]))
        else:  # separate files for ONNX Runtime, part of a TensorRT engine
            weights = sum(file.size_bytes for file in (component.graph, *component.weights))
        total += count * (edges + weights)
    return total


def _sizes(work: Work) -> dict[str, int]:
    """The size of every named dimension."""
    frames, height, width = work.latents.shape[2:]
    sizes = {"frames": frames, "height": height, "width": width, "tokens": work.token_ids.shape[1]}
    return sizes | {"rows": height // PATCH[1], "columns": width // PATCH[2]}


def peak_of(bundle: Bundle) -> Peak:
    """The peaks of the target of ``bundle``. For the CPU they are measured, which takes about a second."""
    build = bundle.manifest.build
    target = target_named(build.target if build else "cpu")
    if target.backend == "onnxruntime":
        return measure_peak()
    rates = {p: None if (t := target.peak_tflops(p.linears)) is None else t * 1e12 for p in Precision}
    return Peak(rates, target.bandwidth_gb_s * 1e9 or math.inf, target.source)


@cache
def measure_peak() -> Peak:
    """Measure the CPU's peaks once per process: the best processor time of a few tries, to exclude other load."""
    a, b, out = (np.ones((MATRIX, MATRIX), np.float32) for _ in range(3))
    product = min(_cpu_seconds(lambda: np.matmul(a, b, out=out)) for _ in range(TRIES))
    source, target = np.ones(COPY_BYTES // 4, np.float32), np.ones(COPY_BYTES // 4, np.float32)
    copy = min(_cpu_seconds(lambda: np.copyto(target, source)) for _ in range(TRIES))
    cores = usable_cores()
    rate = cores * 2 * MATRIX**3 / product
    how = f"measured: numpy's float32 product of {MATRIX}x{MATRIX} on a core, times {cores} cores; one core's copy"
    return Peak(dict.fromkeys((Precision.FP32, Precision.FP16), rate), 2 * COPY_BYTES / copy, how)


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = process_time()
    work()
    return process_time() - started
