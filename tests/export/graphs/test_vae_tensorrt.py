"""TensorRT compiles every VAE graph to convolutions with everything else fused around them.

TensorRT-RTX builds without a GPU and shares its parser and compiler with TensorRT; its verbose log lists the kernels.
"""

import re
from collections import Counter

import pytest

from export.checkpoint.schema import vae_tensors
from export.graphs.builder import FLOAT, FLOAT16
from tests.export.conftest import made_up
from tests.export.graphs.vae_chunks import HALVES, MODELS, write
from wan22.specs import SPECS

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytestmark = pytest.mark.slow
FUSED = {"kgen", "correlation", "gemm", "runtime_fusion", "avgpool"}  # generated, convolution, MatMul, ..., pooling
BOOKKEEPING = {"shape_call", "signal", "wait"}


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.messages = []

    def log(self, severity, message):
        self.messages.append(message)


def compiled(path, profile):
    """The name and type of every kernel of the engine for SM 8.9, with the shapes of ``profile`` (min, opt, max)."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    shapes = builder.create_optimization_profile()
    for name, sizes in profile.items():
        shapes.set_shape(name, *sizes)
    config.add_optimization_profile(shapes)
    assert builder.build_serialized_network(network, config) is not None, log.messages[-3:]
    layers = next(message for message in log.messages if message.startswith("Layers:"))
    return re.findall(r"^Name: (\S+), LayerType: (\w+)", layers, re.MULTILINE)


def sized(tensor, side):
    """The dimensions of an edge if the latent grid has ``side`` rows and columns; "8*height" is eight times that."""
    factors = (1 if isinstance(d, int) or "*" not in d else int(d.split("*")[0]) for d in tensor.dims)
    return [d if isinstance(d, int) else factor * side for d, factor in zip(tensor.dims, factors, strict=True)]


@pytest.mark.parametrize("compute", [FLOAT, FLOAT16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "next"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("model", MODELS)
def test_three_kernels_per_convolution(model, half, first, compute, tmp_path):
    """Sum of squares; norm, SiLU, concatenation and cache; convolution with the residual. All operators are fused."""
    spec = SPECS[model].vae
    g = HALVES[half](spec, first, compute)
    profile = {tensor.name: [sized(tensor, side) for side in (8, 16, 32)] for tensor in g.edges()[0]}
    kernels = compiled(write(g, made_up(vae_tensors(spec)), tmp_path), profile)
    kinds = Counter(kind for _, kind in kernels if kind not in BOOKKEEPING)
    convolutions = sum(node.op_type == "Conv" for node in g.graph)
    assert set(kinds) <= FUSED
    assert kinds.total() <= 3 * convolutions + 6
