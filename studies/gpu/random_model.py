"""Models of real size with the same random weights in diffusers' module and in our graph.

Times do not depend on the values, but power does, and so does the check that both sides compute the same. So the
weights are not zeros.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from engines.cuda.attention import OLDEST_ONNXRUNTIME
from engines.cuda.passes import fit_transformer, lower_opset
from engines.targets import FIRST_FLASH
from export.checkpoint.keys import diffusers_names
from export.checkpoint.schema import Shapes
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, GraphBuilder, Placed
from export.graphs.dit import dit_graph
from export.graphs.vae_decoder import vae_decoder
from runtime.engine import Engine
from runtime.engine_cuda import CudaDevice
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from validate.reference.parts import lower
from wan22.component import Component, File
from wan22.precision import Precision
from wan22.specs import ModelSpec

Weights = Mapping[str, torch.Tensor]  # by official name
Place = Callable[[Mapping[str, Any]], dict[str, Any]]  # arrays by name, moved to where an engine computes
COMPUTE = {Precision.BF16: BFLOAT16, Precision.FP16: FLOAT16, Precision.FP32: FLOAT}
STORED = {ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT16: torch.float16, ir.DataType.FLOAT: torch.float32}
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


@contextmanager
def transformer_engine(
    spec: ModelSpec, weights: dict[str, torch.Tensor], folder: Path, precision: Precision, device: str
) -> Iterator[tuple[Engine, Place]]:
    """Write our graph of an expert into ``folder`` as a build for CUDA does; yields :func:`opened` of it.

    ``weights`` is emptied once it is on the disk, since a GPU may not hold a model twice.
    """
    graph = dit_graph(spec.dit, COMPUTE[precision])
    write_weights([graph], weights, folder)
    weights.clear()
    if device == "cuda":
        torch.cuda.empty_cache()
    model = ir.Model(graph.graph, ir_version=11)
    fit_transformer(model, spec.dit)
    ir.save(model, folder / "transformer.onnx")
    with opened(folder, _component(graph, folder, "transformer", precision), device) as engine:
        yield engine


@contextmanager
def decoder_engines(spec: ModelSpec, weights: Weights, folder: Path, device: str) -> Iterator[tuple[Engine, Engine]]:
    """Engines of the VAE's decoder in float32, for the first latent frame and for later ones."""
    graphs = {"first": vae_decoder(spec.vae, first=True), "next": vae_decoder(spec.vae, first=False)}
    write_weights(list(graphs.values()), weights, folder)
    components = []
    for name, graph in graphs.items():
        model = ir.Model(graph.graph, ir_version=11)
        lower_opset(model)
        ir.save(model, folder / f"{name}.onnx")
        components.append(_component(graph, folder, name, Precision.FP32))
    with opened(folder, components[0], device) as (first, _), opened(folder, components[1], device) as (later, _):
        yield first, later


@contextmanager
def opened(folder: Path, component: Component, device: str) -> Iterator[tuple[Engine, Place]]:
    """The engine of ``component``, and a function that puts arrays where it computes: on the GPU for "cuda"."""
    if device == "cpu":
        with OnnxRuntimeEngine(folder, component) as on_cpu:
            yield on_cpu, dict
        return
    with open_device() as gpu, gpu.engine(folder, component) as engine:
        yield engine, lambda arrays: {name: gpu.cupy.asarray(array) for name, array in arrays.items()}


def open_device() -> CudaDevice:
    """The GPU, with the checks of a pipeline."""
    oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
    return CudaDevice.open(oldest, FIRST_FLASH)


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


def _component(graph: GraphBuilder, folder: Path, name: str, precision: Precision) -> Component:
    weights = File(WEIGHTS, "", (folder / WEIGHTS).stat().st_size)
    inputs, outputs = graph.edges()
    return Component(name, File(f"{name}.onnx", "", 0), (weights,), inputs, outputs, precision)
