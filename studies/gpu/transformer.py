"""One forward of a transformer of real size: PyTorch in bfloat16, compared with our graph on ONNX Runtime."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from export.checkpoint.schema import dit_tensors
from runtime.arrays import F32
from runtime.forward_inputs import forward_inputs
from runtime.noise import standard_normal
from studies.gpu.random_model import Weights, fill_module, random_weights, transformer_engine
from studies.gpu.stage import Measurement, StageSettings, reason_of
from studies.gpu.timing import median_ms, time_ms
from validate.bench.samples import Ratio
from validate.reference.parts import timesteps_of, transformer
from wan22.residency import Video
from wan22.specs import TEXT_TOKENS, ModelSpec, Precision, spec_named, tokens

TIMESTEP = 900.0
RUNS = 5
FEW_BLOCKS = 2  # blocks are alike, so few are enough to compare two libraries
RESERVED_BYTES = 4 * 2**30
ROWS_ALIVE = 24  # upper bound of the activations of the model's width that are alive at once


@dataclass(frozen=True)
class ForwardCase:
    """A forward: the model, possibly with fewer blocks, and the video."""

    spec: ModelSpec
    video: Video
    device: str
    dtype: torch.dtype
    seed: int

    @property
    def tokens(self) -> int:
        return tokens(self.spec.latent_shape(*self.video))

    def cut(self, blocks: int) -> "ForwardCase":
        return replace(self, spec=replace(self.spec, dit=replace(self.spec.dit, layers=blocks)))

    def weights(self) -> Weights:
        return random_weights(dit_tensors(self.spec.dit), self.device, self.dtype, self.seed)


def compare_blocks(setting: StageSettings, model: str, video: Video) -> Iterator[Measurement]:
    """Compare the first blocks on both sides, in turns, with the same weights."""
    case = _case(setting, model, video).cut(FEW_BLOCKS)
    weights = case.weights()
    torch_step = _torch_step(case, weights)
    yield Measurement("tokens", case.tokens, "tokens", f"{FEW_BLOCKS} blocks")
    yield Measurement("PyTorch", median_ms(case.device, torch_step, RUNS), "ms", str(case.dtype).split(".")[-1])
    for precision in (Precision.FP32,) if setting.dry_run else (Precision.BF16, Precision.FP16):
        try:
            yield from _onnxruntime_beside(case, weights, torch_step, precision)
        except Exception as error:  # an unsupported dtype is a result
            yield Measurement(f"ONNX Runtime {precision.value}", note=f"no: {reason_of(error)}")


def whole_model(setting: StageSettings, model: str, videos: tuple[Video, ...]) -> Iterator[Measurement]:
    """Time PyTorch with as many blocks as fit next to the activations of the largest video."""
    cases = [_case(setting, model, video) for video in videos]
    blocks = _blocks_that_fit(max(cases, key=lambda case: case.tokens))
    weights = cases[0].cut(blocks).weights()
    yield Measurement("blocks", blocks, "blocks", f"of {cases[0].spec.dit.layers}")
    for case in cases:
        name = "PyTorch {}x{}, {} frames".format(*case.video)
        milliseconds = median_ms(case.device, _torch_step(case.cut(blocks), weights), RUNS)
        yield Measurement(name, milliseconds, "ms", f"{case.tokens} tokens")


def _case(setting: StageSettings, model: str, video: Video) -> ForwardCase:
    if setting.dry_run:
        return ForwardCase(spec_named(f"{model}-tiny"), (64, 64, 5), "cpu", torch.float32, setting.seed)
    return ForwardCase(spec_named(model), video, "cuda", torch.bfloat16, setting.seed)


def _blocks_that_fit(case: ForwardCase) -> int:
    """The number of blocks that fit. Raises MemoryError if none fits."""
    if case.device == "cpu":
        return case.spec.dit.layers
    free, _ = torch.cuda.mem_get_info()
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in dit_tensors(case.spec.dit).items()}
    a_block = sum(size for name, size in sizes.items() if name.startswith("blocks.0."))
    activations = ROWS_ALIVE * 2 * case.tokens * case.spec.dit.width
    fitting = int((free - RESERVED_BYTES - activations) // a_block)
    if fitting < 1:
        raise MemoryError(f"{free / 2**30:.1f} GiB of GPU memory are free, too little for one block")
    return min(fitting, case.spec.dit.layers)


# -- the sides


def _latents(case: ForwardCase) -> F32:
    return standard_normal(case.spec.latent_shape(*case.video), case.seed)


def _text(case: ForwardCase) -> F32:
    return standard_normal((1, TEXT_TOKENS, case.spec.dit.text_width), case.seed + 1)


def _torch_step(case: ForwardCase, weights: Weights) -> Callable[[], torch.Tensor]:
    with torch.device("meta"):
        module = transformer(case.spec)
    module = fill_module(module, case.spec.experts[0], case.spec, weights, case.dtype).to(case.device)
    latents, text = (torch.from_numpy(x).to(case.device, case.dtype) for x in (_latents(case), _text(case)))
    times = timesteps_of(case.spec, latents.shape, TIMESTEP).to(case.device)

    @torch.inference_mode()
    def step() -> torch.Tensor:
        velocity: torch.Tensor
        (velocity,) = module(hidden_states=latents, encoder_hidden_states=text, timestep=times, return_dict=False)
        return velocity

    return step


def _onnxruntime_beside(
    case: ForwardCase, weights: Weights, torch_step: Callable[[], torch.Tensor], precision: Precision
) -> Iterator[Measurement]:
    name, device = f"ONNX Runtime {precision.value}", case.device
    inputs = forward_inputs(case.spec.dit, _latents(case), TIMESTEP, _text(case))
    with (
        tempfile.TemporaryDirectory() as folder,
        transformer_engine(case.spec, weights, Path(folder), precision, device) as engine,
    ):
        found, expected = engine(**inputs), torch_step().float().cpu().numpy()
        pairs = [(time_ms(device, torch_step), time_ms(device, lambda: engine(**inputs))) for _ in range(RUNS)]
    theirs, ours = zip(*pairs, strict=True)
    ratio = Ratio.of(theirs, ours)
    yield Measurement(name, float(np.median(ours)), "ms", "in turns with PyTorch")
    yield Measurement(f"{name}, speed-up", ratio.median, "x", f"{ratio.p10:.2f} to {ratio.p90:.2f}")
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    yield Measurement.of(f"{name}, relative L2", error, "", "to PyTorch")
