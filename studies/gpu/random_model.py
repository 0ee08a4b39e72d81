"""Models of real size with the same random weights in diffusers' module and in our graph.

Times do not depend on the values, but power does, and so does the check that both sides compute the same. So the
weights are not zeros.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Self

import onnx_ir as ir
import torch

from engines.cpu.attention import fuse_attention
from export.checkpoint.keys import diffusers_names
from export.checkpoint.schema import Shapes
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, GraphBuilder, Placed
from export.graphs.dit import dit_graph
from export.graphs.vae_decoder import vae_decoder
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from validate.reference.parts import lower
from wan22.bundle import Component, File
from wan22.errors import UserError
from wan22.specs import ModelSpec, Precision

Weights = Mapping[str, torch.Tensor]  # by official name
COMPUTE = {Precision.BF16: BFLOAT16, Precision.FP16: FLOAT16, Precision.FP32: FLOAT}
STORED = {ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT16: torch.float16, ir.DataType.FLOAT: torch.float32}
CUDA = "CUDAExecutionProvider"
WEIGHTS = "weights.bin"


def random_weights(shapes: Shapes, device: str, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random weights: matrices that preserve the magnitude of their input, norms near 1, biases near 0."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
        vector = prod(shape) == max(shape)
        value *= 0.02 if vector else prod(shape[1:]) ** -0.5
        found[name] = value + 1 if vector and name.endswith(("weight", "gamma")) else value
    return found


def fill_module(module: Any, part: str, spec: ModelSpec, weights: Weights, dtype: torch.dtype) -> Any:
    """Load ``weights`` into ``module`` from the meta device; parts that diffusers keeps in float32 stay so."""
    names = diffusers_names(part, spec)
    module.load_state_dict({theirs: weights[official] for official, theirs in names.items()}, strict=True, assign=True)
    module.requires_grad_(False)
    lower(module, dtype)
    return module.eval()


def transformer_engine(
    spec: ModelSpec, weights: Weights, folder: Path, precision: Precision, device: str
) -> OnnxRuntimeEngine:
    """Write our graph of an expert, with ONNX Runtime's fused attention, into ``folder``; returns its engine."""
    graph = dit_graph(spec.dit, COMPUTE[precision])
    write_weights([graph], weights, folder)
    model = ir.Model(graph.graph, ir_version=11)
    fuse_attention(model, spec.dit.heads, spec.dit.head_width)
    ir.save(model, folder / "transformer.onnx")
    return _engine(graph, folder, "transformer", precision, device)


def decoder_engines(spec: ModelSpec, weights: Weights, folder: Path, device: str) -> list[OnnxRuntimeEngine]:
    """Engines of the VAE's decoder in float32, for the first latent frame and for later ones."""
    graphs = {"first": vae_decoder(spec.vae, first=True), "next": vae_decoder(spec.vae, first=False)}
    write_weights(list(graphs.values()), weights, folder)
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.onnx")
    return [_engine(graph, folder, name, Precision.FP32, device) for name, graph in graphs.items()]


def write_weights(graphs: list[GraphBuilder], weights: Weights, folder: Path) -> None:
    """Write one file for all ``graphs`` with each weight once, in the dtype that the graphs declare."""
    declared = {key: value.dtype for graph in graphs for key, value in graph.weights.items()}
    placed: dict[str, Placed] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for key, dtype in declared.items():
            start = file.tell()
            raw = weights[key].to(STORED[dtype or FLOAT]).cpu().contiguous().view(torch.uint8)
            raw.reshape(-1).numpy().tofile(file)
            file.flush()
            placed[key] = Placed(WEIGHTS, start, file.tell() - start)
    for graph in graphs:
        graph.bind({key: placed[key] for key in graph.weights}, folder)


def _engine(graph: GraphBuilder, folder: Path, name: str, precision: Precision, device: str) -> OnnxRuntimeEngine:
    file, weights = (File(leaf, "", (folder / leaf).stat().st_size) for leaf in (f"{name}.onnx", WEIGHTS))
    inputs, outputs = graph.edges()
    kind = CudaEngine if device == "cuda" else OnnxRuntimeEngine
    return kind(folder, Component(name, file, (weights,), inputs, outputs, precision))


class CudaEngine(OnnxRuntimeEngine):
    """An engine that requires the GPU. ONNX Runtime alone falls back to the CPU if CUDA does not start."""

    def __enter__(self) -> Self:
        import onnxruntime

        if CUDA not in onnxruntime.get_available_providers():
            raise UserError("onnxruntime without CUDA", "onnxruntime-gpu", "pip install 'wan-trt[gpu]'")
        super().__enter__()
        if CUDA not in self._session.get_providers():
            self._session = None
            raise UserError("ONNX Runtime could not start CUDA", "the CUDA it was built for", "see its message")
        return self
