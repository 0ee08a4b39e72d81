"""The memory that a model needs, from its spec alone, and the engines that stay loaded in the available memory.

Sizes of weights are exact. Scratch memory is the graph's peak of live tensors times a factor measured on the compiler's
memory planner; the estimates are within 15 % of builds of real-size blocks and VAEs. ``wan-trt plan`` and a pipeline
with ``residency="auto"`` use the same figures.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from wan22.costs import (
    VaeLayer,
    block_parameters,
    cache_elements,
    decoder_layers,
    dit_parameters,
    encoder_layers,
    matrices_bytes,
    text_encoder_parameters,
    vectors_bytes,
)
from wan22.errors import UserError
from wan22.parts import DitSpec, TextEncoderSpec, VaeSpec
from wan22.precision import Number, Precision
from wan22.quantities import human_bytes
from wan22.specs import TEXT_TOKENS, ModelSpec, tokens
from wan22.strips import Half, half_of
from wan22.vae_memory import staged_vae

Residency = Literal["all", "one-expert", "one-component"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)  # by the engines that stay loaded, most first
ONE_EXPERT = RESIDENCIES[1:]  # those that leave memory for other work
ResidencyChoice = Literal["all", "one-expert", "one-component", "auto"]
Video = tuple[int, int, int]  # width, height in pixels; frames

PLANNER_FACTOR = 1.3  # ratio of scratch memory to live tensors: 1.14 to 1.36 in builds for SM89 and SM120
OF_HIDDEN_AGAIN = 0.6  # share of the hidden rows that NVFP4, and then a branch, keep once more, in builds for SM120
# ratio of a VAE's scratch memory to its largest tensor, measured at 720p, by bits: norms are in float32 in any case
VAE_TENSORS = {("2.1", 32): 1.9, ("2.1", 16): 2.8, ("2.2", 32): 3.9, ("2.2", 16): 5.3}
VRAM_RESERVED = 0.06  # fraction of the card: driver, context, ECC, fragmentation
SHARES = range(16, 0, -1)  # sixteenths of a side to try for a smaller video
WHOLE_VAE: Mapping[Half, int] = {}  # no half of the VAE in stages
CALL_COPIES = 2  # copies of a recorded call's inputs: the caller's, and those at the recorded addresses


@dataclass(frozen=True)
class Memory:
    """The memory of one graph's engine, in bytes."""

    component: str
    weights: float
    scratch: float
    inputs_and_outputs: float

    strips: int = 0  # of pictures, if the component is a half of the VAE in stages

    @property
    def has_state(self) -> bool:
        """True for a VAE, which passes gigabytes of caches between calls; the inputs of other graphs are small."""
        return self.component.startswith("vae")

    @property
    def kept(self) -> float:
        """The memory that stays allocated while another engine runs."""
        return self.weights + (0.0 if self.has_state else CALL_COPIES * self.inputs_and_outputs)

    @property
    def state(self) -> float:
        """The memory passed between calls, freed after the last."""
        return self.inputs_and_outputs if self.has_state else 0.0


def usual_precisions(spec: ModelSpec, precision: Precision) -> dict[str, Precision]:
    """The default precision of every component: the VAE in float32, the text encoder never below 16 bits."""
    of_vae = {name: Precision.FP32 for name in spec.components if name.startswith("vae")}
    return {"text_encoder": precision.wide, **dict.fromkeys(spec.experts, precision), **of_vae}


def engines_memory(
    spec: ModelSpec,
    precisions: Mapping[str, Precision],
    video: Video,
    *,
    cache_sets: int = 2,
    vae_strips: Mapping[Half, int] = WHOLE_VAE,
    low_rank: int = 0,
) -> dict[str, Memory]:
    """The memory of the engines of ``spec`` for ``video``, by component; only those in ``precisions``.

    Args:
        spec: the model.
        precisions: by component.
        video: width, height, frames.
        cache_sets: sets of VAE caches in memory during a call: 2 if read and written separately, 1 if overwritten.
        vae_strips: halves of the VAE in stages, and the number of strips of their pictures.
        low_rank: of the branches beside NVFP4 matrices.

    Raises:
        UserError: the model does not support the size or number of frames, or there are too many strips.
    """
    shape = spec.latent_shape(*video)
    found: dict[str, Memory] = {}
    for name in (name for name in spec.components if name in precisions):
        if name.endswith("_next") and shape[2] == 1:
            continue  # there is only the first latent frame
        if name == "text_encoder":
            found[name] = _text_encoder(spec.text_encoder, precisions[name])
        elif name.startswith("vae") and (half := half_of(name)) in vae_strips:
            sizes = staged_vae(spec.vae, half, precisions[name], shape, vae_strips[half], cache_sets=cache_sets)
            found[half] = Memory(half, sizes.weights, sizes.scratch, sizes.state, sizes.strips)
        elif name.startswith("vae"):
            found[name] = _vae(spec.vae, name, precisions[name], shape, cache_sets)
        else:
            found[name] = _expert(spec, name, precisions[name], shape, low_rank)
    return found


def needed_bytes(spec: ModelSpec, memory: Mapping[str, Memory]) -> dict[Residency, float]:
    """The peak memory of a run by residency; a model with one expert has no "one-expert"."""
    experts = spec.experts
    one_expert = [name for name in memory if name not in experts[1:]]
    ways: dict[Residency, float] = {"all": _together(memory.values())}
    if len(experts) > 1:
        ways["one-expert"] = _together(memory[name] for name in one_expert)
    return ways | {"one-component": max(_together([each]) for each in memory.values())}


def choose_residency(needed: Mapping[Residency, float], available: float) -> Residency | None:
    """The residency that keeps the most and fits into ``available`` bytes; None if none fits."""
    return next((way for way in RESIDENCIES if way in needed and needed[way] <= available), None)


def largest_fitting(
    spec: ModelSpec,
    precisions: Mapping[str, Precision],
    video: Video,
    available: float,
    *,
    cache_sets: int = 2,
    low_rank: int = 0,
    memory_of: Callable[[Video], Mapping[str, Memory]] | None = None,
) -> Video | None:
    """The largest video of about the same aspect ratio that fits with one component at a time.

    It is at least half as long as ``video``, or a single picture if no video fits; None if not even that fits.
    ``memory_of`` has the memory of engines that are not whole.
    """

    def fits(size: tuple[int, int], frames: int) -> bool:
        asked = (*size, frames)
        try:
            if memory_of is not None:
                memory = memory_of(asked)
            else:
                memory = engines_memory(spec, precisions, asked, cache_sets=cache_sets, low_rank=low_rank)
        except UserError:  # such as fewer rows than strips
            return False
        return needed_bytes(spec, memory)["one-component"] <= available

    width, height, frames = video
    multiple, stride = spec.size_multiple, spec.vae.temporal_stride
    lengths = [*range(frames, frames // 2, -stride), 1]
    sizes = [tuple(max(1, side * share // (16 * multiple)) * multiple for side in (width, height)) for share in SHARES]
    for several in (lengths[:-1], lengths[-1:]):
        for wide, high in sizes:
            if several and fits((wide, high), several[-1]):  # fewer frames never take more
                return wide, high, several[bisect_left(several, True, key=partial(fits, (wide, high)))]
    return None


def refusal(
    needed: Mapping[Residency, float], memory: Mapping[str, Memory], available: float, fitting: Video | None
) -> UserError:
    """The error if no residency fits into ``available`` bytes, with the video that would fit."""
    worst = max(memory.values(), key=lambda each: _together([each]))
    found = f"{worst.component} alone takes {human_bytes(needed['one-component'])}"
    if worst.has_state:
        found += f", {human_bytes(worst.inputs_and_outputs)} of it caches and frames"
    fits = "no smaller video fits either" if fitting is None else "{}x{} with --frames {} fits".format(*fitting)
    remedy = f"{fits}; --residency one-component tries anyway"
    return UserError(found, f"at most {human_bytes(available)}", remedy)


def _together(engines: Iterable[Memory]) -> float:
    """The memory of engines loaded together. They share one region of scratch memory, the largest one needed."""
    engines = list(engines)
    shared = max(each.scratch for each in engines) + max(each.state for each in engines)
    return sum(each.kept for each in engines) + shared


# -- components


def _text_encoder(spec: TextEncoderSpec, precision: Precision) -> Memory:
    wide = precision.wide.linears.bits / 8
    biases = spec.layers * spec.heads * TEXT_TOKENS  # position biases, computed for all layers first
    scratch = PLANNER_FACTOR * TEXT_TOKENS * (2 * spec.ffn_width + 2 * spec.width + biases) * wide
    return Memory("text_encoder", text_encoder_weights_bytes(spec, precision), scratch, 4.0 * TEXT_TOKENS * spec.width)


def text_encoder_weights_bytes(spec: TextEncoderSpec, precision: Precision) -> float:
    """The size of the stored weights; only feed-forward matrices can be in FP8."""
    count = text_encoder_parameters(spec)
    wide, linears = precision.wide.linears.bits / 8, precision.linears.bits / 8
    feed_forward = spec.layers * 3 * spec.width * spec.ffn_width
    scales = 4 * spec.layers * (2 * spec.ffn_width + spec.width) if precision.quantised else 0
    return wide * (count - feed_forward) + linears * feed_forward + scales


def _expert(spec: ModelSpec, name: str, precision: Precision, latent_shape: tuple[int, ...], low_rank: int) -> Memory:
    dit, positions = spec.dit, latent_shape[2] * latent_shape[3] * latent_shape[4]
    count = tokens(latent_shape)
    channels = dit.in_channels + dit.out_channels
    rope = 2 * count * dit.head_width / 2
    given = TEXT_TOKENS * dit.text_width + dit.time_rows * dit.freq_width
    edges = 4.0 * (channels * positions + rope + given)
    weights, scratch = dit_weights_bytes(dit, precision, low_rank), dit_scratch_bytes(dit, count, precision, low_rank)
    return Memory(name, weights, scratch, edges)


def dit_weights_bytes(spec: DitSpec, precision: Precision, low_rank: int = 0) -> float:
    """The size of one expert's stored weights: matrices in ``precision``, embeddings in its ``wide``, rest float32."""
    wide, block = precision.wide.linears.bits / 8, block_parameters(spec)
    width = spec.width
    per_block = matrices_bytes(spec, precision, low_rank) + vectors_bytes(spec, precision)
    per_block += (4 if precision.quantised else wide) * block.bias + 4 * block.other
    text_and_patch = (spec.text_width + width + 2) * width + (4 * spec.in_channels + 1) * width
    rest = dit_parameters(spec) - spec.layers * block.total - text_and_patch
    return float(spec.layers * per_block + wide * text_and_patch + 4 * rest)


def dit_scratch_bytes(spec: DitSpec, count: int, precision: Precision, low_rank: int = 0) -> float:
    """The memory between kernels for ``count`` tokens: the larger of two peaks, in rows of D 16-bit numbers.

    Attention: the float32 residual stream (2), the joint q, k, v (3) and the same three as attention's operands.
    Feed-forward: the residual stream and the hidden rows, in FP8 also their quantised copy; part of them once more for
    NVFP4, which a kernel of its own quantises, and for the products of branches.
    """
    wide = precision.wide.linears.bits / 16  # rows are twice as wide in float32
    hidden = spec.ffn_width / spec.width
    attention = 2 + 3 * wide + 3 * precision.attention.bits / 16
    feed_forward = 2 + ((wide + precision.linears.bits / 16) * hidden if precision.quantised else wide * (1 + hidden))
    feed_forward += OF_HIDDEN_AGAIN * hidden * ((precision.linears is Number.NVFP4) + bool(low_rank))
    return PLANNER_FACTOR * max(attention, feed_forward) * 2.0 * count * spec.width


def _vae(spec: VaeSpec, name: str, precision: Precision, latent_shape: tuple[int, ...], cache_sets: int) -> Memory:
    """The memory of one VAE graph. The first chunk only writes caches, which are float16 in float16 graphs."""
    half, first, size = name.rpartition("_")[0], name.endswith("_first"), (latent_shape[3], latent_shape[4])
    positions = size[0] * size[1]
    weights = vae_weights_bytes(spec, name, precision)
    convolutions = [layer for layer in _layers(spec, name) if layer.taps]
    largest = max(max(x.entering, x.leaving) * x.frames * x.scale**2 * positions for x in convolutions)
    bits = precision.linears.bits
    scratch = VAE_TENSORS[spec.generation, bits] * bits / 8 * largest
    frames, sets = (1, 1) if first else (spec.temporal_stride, cache_sets)
    pixels = 3 * frames * spec.spatial_stride**2 * positions
    cached = (2 if precision == Precision.FP16 else 4) * sets * cache_elements(spec, half, size)
    edges = cached + 4.0 * (pixels + spec.latent_channels * positions)
    return Memory(name, weights, scratch, edges)


def vae_weights_bytes(spec: VaeSpec, component: str, precision: Precision) -> float:
    """The size of one graph's weights; the first chunk's graph needs no taps for past frames."""
    return float(precision.linears.bits / 8 * sum(layer.parameters for layer in _layers(spec, component)))


def _layers(spec: VaeSpec, component: str) -> list[VaeLayer]:
    layers = decoder_layers if component.startswith("vae_decoder") else encoder_layers
    return list(layers(spec, component.endswith("_first")))
