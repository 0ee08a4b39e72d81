"""One forward of a transformer of real size: PyTorch in bfloat16, compared with our graph on ONNX Runtime."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engines.targets import detect
from export.checkpoint.schema import dit_tensors
from runtime.arrays import F32, to_numpy
from runtime.forward_inputs import forward_inputs
from runtime.noise import standard_normal
from studies.gpu.random_model import Weights, fill_module, random_weights, transformer_engine
from studies.gpu.stage import Measurement, StageSettings, reason_of
from studies.gpu.timing import median_ms, peak_gib, time_ms
from validate.bench.samples import Ratio
from validate.reference.parts import timesteps_of, transformer
from wan22.costs import dit_flops
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.residency import Video
from wan22.specs import TEXT_TOKENS, ModelSpec, spec_named, tokens

TIMESTEP = 900.0
RUNS = 5
FEW_BLOCKS = 2  # blocks are alike, so few are enough to compare two libraries
RESERVED_BYTES = 4 * 2**30
MLPERF_STEPS, MLPERF_VIDEO = 20, (1280, 720, 81)
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
    def named(self) -> str:
        return "{}x{}, {} frames".format(*self.video)

    @property
    def tokens(self) -> int:
        return tokens(self.spec.latent_shape(*self.video))

    def cut(self, blocks: int) -> "ForwardCase":
        return replace(self, spec=replace(self.spec, dit=replace(self.spec.dit, layers=blocks)))

    def weights(self) -> dict[str, torch.Tensor]:
        return random_weights(dit_tensors(self.spec.dit), self.device, self.dtype, self.seed)


def compare_blocks(setting: StageSettings, model: str, videos: tuple[Video, ...]) -> Iterator[Measurement]:
    """Compare the first blocks on both sides, in turns, with the same weights."""
    for video in videos:
        case = _case(setting, model, video).cut(FEW_BLOCKS)
        weights = case.weights()
        torch_step = _torch_step(case, weights)
        yield Measurement(f"{case.named}, tokens", case.tokens, "tokens", f"{FEW_BLOCKS} blocks")
        yield from _torch(case, torch_step)
        yield _compiled(setting, case, weights)
        for precision in (Precision.FP32,) if setting.dry_run else (Precision.BF16, Precision.FP16):
            try:
                yield from _onnxruntime_beside(case, weights, torch_step, precision)
            except Exception as error:  # an unsupported dtype is a result
                yield Measurement(f"{case.named}, ONNX Runtime {precision.value}", note=f"no: {reason_of(error)}")


def whole_model(setting: StageSettings, model: str, videos: tuple[Video, ...]) -> Iterator[Measurement]:
    """Time PyTorch with as many blocks as fit next to the activations of the largest video, then our engine alone."""
    cases = [_case(setting, model, video) for video in videos]
    blocks = _blocks_that_fit(max(cases, key=lambda case: case.tokens))
    cut = [case.cut(blocks) for case in cases]
    weights = cut[0].weights()
    yield Measurement("blocks", blocks, "blocks", f"of {cases[0].spec.dit.layers}")
    expected = {}
    for case in cut:
        yield from _torch(case, _torch_step(case, weights))
        yield _compiled(setting, case, weights)
        expected[case.video] = _torch_step(case, weights)().float().cpu().numpy()
    whole = blocks == cases[0].spec.dit.layers and not setting.dry_run
    yield from _ours_alone(setting, cut, weights, expected, whole=whole)


def _ours_alone(
    setting: StageSettings,
    cases: Sequence[ForwardCase],
    weights: dict[str, torch.Tensor],
    expected: Mapping[Video, F32],
    *,
    whole: bool,
) -> Iterator[Measurement]:
    """Time our engine once ``weights`` are on the disk and gone from the GPU; compare it with PyTorch's results."""
    precision = Precision.FP32 if setting.dry_run else Precision.BF16
    with tempfile.TemporaryDirectory() as folder:
        making = transformer_engine(cases[0].spec, weights, Path(folder), precision, setting.device)
        with making as (engine, place):
            for case in cases:
                inputs = place(_our_inputs(case))
                milliseconds = median_ms(case.device, partial(engine, **inputs), RUNS)
                yield from _ours(case, precision, milliseconds)
                yield _error(case, precision, to_numpy(engine(**inputs)), expected[case.video])
                if whole and case.video == MLPERF_VIDEO:
                    seconds = 2 * MLPERF_STEPS * milliseconds / 1000
                    note = "extrapolated from a forward; without text encoder and VAE"
                    yield Measurement("MLPerf's setting, 20 steps", seconds, "s", note)


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


def _torch_step(case: ForwardCase, weights: Weights, compiler: str = "") -> Callable[[], torch.Tensor]:
    with torch.device("meta"):
        module = transformer(case.spec)
    module = fill_module(module, case.spec.experts[0], case.spec, weights, case.dtype).to(case.device)
    if compiler:
        module = torch.compile(module, backend=compiler)
    latents, text = (torch.from_numpy(x).to(case.device, case.dtype) for x in (_latents(case), _text(case)))
    times = timesteps_of(case.spec, latents.shape, TIMESTEP).to(case.device)

    @torch.inference_mode()
    def step() -> torch.Tensor:
        velocity: torch.Tensor
        (velocity,) = module(hidden_states=latents, encoder_hidden_states=text, timestep=times, return_dict=False)
        return velocity

    return step


def _our_inputs(case: ForwardCase) -> dict[str, F32]:
    return forward_inputs(case.spec.dit, _latents(case), TIMESTEP, _text(case))


def _onnxruntime_beside(
    case: ForwardCase, weights: Weights, torch_step: Callable[[], torch.Tensor], precision: Precision
) -> Iterator[Measurement]:
    device = case.device
    with (
        tempfile.TemporaryDirectory() as folder,
        transformer_engine(case.spec, dict(weights), Path(folder), precision, device) as (engine, place),
    ):
        inputs = place(_our_inputs(case))
        found, expected = to_numpy(engine(**inputs)), torch_step().float().cpu().numpy()
        pairs = [(time_ms(device, torch_step), time_ms(device, lambda: engine(**inputs))) for _ in range(RUNS)]
        gib = peak_gib(device, lambda: engine(**inputs))
    theirs, ours = zip(*pairs, strict=True)
    ratio, name = Ratio.of(theirs, ours), f"{case.named}, ONNX Runtime {precision.value}"
    yield from _ours(case, precision, float(np.median(ours)))
    yield Measurement(f"{name}, speed-up", ratio.median, "x", f"{ratio.p10:.2f} to {ratio.p90:.2f}, in turns")
    yield Measurement(f"{name}, memory", gib, "GiB", "beyond the weights and what the session keeps")
    yield _error(case, precision, found, expected)


def _torch(case: ForwardCase, step: Callable[[], torch.Tensor]) -> Iterator[Measurement]:
    milliseconds, name = median_ms(case.device, step, RUNS), f"{case.named}, PyTorch"
    yield Measurement(name, milliseconds, "ms", str(case.dtype).split(".")[-1])
    yield from _share(case, name, milliseconds)
    yield Measurement(f"{name}, memory", peak_gib(case.device, step), "GiB", "beyond the weights")


def _compiled(setting: StageSettings, case: ForwardCase, weights: Weights) -> Measurement:
    """PyTorch's compiler, whose failure is a result."""
    name = f"{case.named}, torch.compile"
    try:
        step = _torch_step(case, weights, compiler="eager" if setting.dry_run else "inductor")
        return Measurement(name, median_ms(case.device, step, RUNS), "ms", str(case.dtype).split(".")[-1])
    except Exception as error:
        return Measurement(name, note=f"no: {reason_of(error)}")


def _ours(case: ForwardCase, precision: Precision, milliseconds: float) -> Iterator[Measurement]:
    name = f"{case.named}, ONNX Runtime {precision.value}"
    yield Measurement(name, milliseconds, "ms", f"{case.tokens} tokens")
    yield from _share(case, name, milliseconds)


def _share(case: ForwardCase, name: str, milliseconds: float) -> Iterator[Measurement]:
    """The part of the GPU's dense peak in 16 bits that a forward reaches, where its figures are known."""
    if (peak := _peak_tflops(case.device)) is not None:
        reached = dit_flops(case.spec.dit, case.tokens).total / milliseconds / 1e9
        yield Measurement(f"{name}, share of the peak", 100 * reached / peak, "%", f"of {peak:g} TFLOP/s")


def _peak_tflops(device: str) -> float | None:
    if device == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability()
    try:
        return detect([(torch.cuda.get_device_name(), f"{major}.{minor}")]).bf16_tflops
    except UserError:
        return None


def _error(case: ForwardCase, precision: Precision, found: F32, expected: F32) -> Measurement:
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return Measurement.of(f"{case.named}, ONNX Runtime {precision.value}, relative L2", error, "", "to PyTorch")
