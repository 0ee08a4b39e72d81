"""What a model will need on a target, before a weight is downloaded or a GPU is rented: ``wan-trt plan``.

Sizes of weights are exact. Scratch memory is the live tensors of the fattest moment of the graph times a factor that
the compiler's memory planner was seen to need; builds of real-size blocks and VAEs were met within 15 %. Times are
rooflines: no run is faster, real ones are often half as fast.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from engines.targets import Target, check_precision
from wan22.costs import (
    VaeLayer,
    block_parameters,
    cache_elements,
    decoder_layers,
    dit_flops,
    dit_parameters,
    encoder_layers,
    model_parameters,
    text_encoder_flops,
    vae_flops,
)
from wan22.parts import DitSpec
from wan22.specs import TEXT_TOKENS, ModelSpec, Number, Precision, tokens

PLANNER_FACTOR = 1.3  # scratch memory over live tensors: 1.14 to 1.36 in builds for SM89 and SM120
VAE_TENSORS = {"2.1": 1.9, "2.2": 3.9}  # scratch memory of a VAE over its largest tensor, as built at 720p
EXPORT_RAM_GIB = 2.0  # exporting streams tensor by tensor; the largest is the text encoder's embedding
BUILD_RAM_FACTOR = 1.5  # anonymous memory over weights with streamed serialisation (beside evictable file pages)
BUILD_RAM_GIB = 1.0  # of the builder itself
KERNEL_CODE_BYTES = 60e6  # in the engine of a full-size transformer
VRAM_RESERVED = 0.06  # of the card: driver, context, ECC, fragmentation


@dataclass(frozen=True)
class Request:
    spec: ModelSpec
    target: Target
    precision: Precision
    video: tuple[int, int, int]  # width, height in pixels; frames
    steps: int
    guided: bool = True  # two forwards per step


@dataclass(frozen=True)
class Memory:
    """Of one component on the GPU, in bytes."""

    component: str
    weights: float
    scratch: float
    inputs_and_outputs: float


@dataclass(frozen=True)
class Plan:
    request: Request

    @cached_property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        return self.request.spec.latent_shape(*self.request.video)

    @cached_property
    def tokens(self) -> int:
        return tokens(self.latent_shape)

    # -- on disk and in the host's memory

    @cached_property
    def weights_bytes(self) -> dict[str, float]:
        """As the bundle stores them: VAE in float32, the text encoder never below 16 bits."""
        spec, precision = self.request.spec, self.request.precision
        wide = precision.wide.linears.bits / 8
        sizes = {"text_encoder": float(wide)} | dict.fromkeys(("vae_decoder", "vae_encoder"), 4.0)
        return {
            part: count * sizes[part] if part in sizes else dit_weights_bytes(spec.dit, precision)
            for part, count in model_parameters(spec).items()
        }

    @property
    def bundle_bytes(self) -> float:
        return sum(self.weights_bytes.values())

    @property
    def engines_bytes(self) -> float:
        experts = len(self.request.spec.experts)
        return self.bundle_bytes + experts * KERNEL_CODE_BYTES * min(1.0, self.request.spec.dit.layers / 30)

    @property
    def build_ram_bytes(self) -> float:
        return BUILD_RAM_FACTOR * max(self.weights_bytes.values()) + BUILD_RAM_GIB * 2**30

    # -- on the GPU

    @cached_property
    def memory(self) -> list[Memory]:
        spec, (_, z, frames, height, width) = self.request.spec, self.latent_shape
        edges = 4.0 * (2 * z + spec.dit.condition_channels) * frames * height * width
        rope = 2 * 4.0 * self.tokens * spec.dit.head_width / 2
        wide = self.request.precision.wide.linears.bits / 8
        found = []
        for part, weights in self.weights_bytes.items():
            if part == "text_encoder":
                text = spec.text_encoder
                biases = text.layers * text.heads * TEXT_TOKENS  # of positions, made for all layers first
                scratch = PLANNER_FACTOR * TEXT_TOKENS * (2 * text.ffn_width + 2 * text.width + biases) * wide
                found.append(Memory(part, weights, scratch, 4.0 * TEXT_TOKENS * text.width))
            elif part.startswith("vae"):
                found.append(self._vae_memory(part, weights))
            else:
                scratch = dit_scratch_bytes(spec.dit, self.tokens, self.request.precision)
                found.append(Memory(part, weights, scratch, edges + rope))
        return found

    def _vae_memory(self, half: str, weights: float) -> Memory:
        """Caches count twice: a chunk reads the old ones and writes the new ones."""
        spec, size = self.request.spec.vae, self.latent_shape[-2:]
        layers = decoder_layers(spec) if half == "vae_decoder" else encoder_layers(spec)
        scratch = VAE_TENSORS[spec.generation] * 4.0 * _largest_tensor(layers, size)
        pixels = 4.0 * 3 * spec.temporal_stride * spec.spatial_stride**2 * size[0] * size[1]
        return Memory(half, weights, scratch, 2 * 4.0 * cache_elements(spec, half, size) + pixels)

    def vram_bytes(self, resident: Iterable[str]) -> float:
        """With the weights of ``resident`` on the card at once, and one scratch arena for all of them."""
        parts = [memory for memory in self.memory if memory.component in set(resident)]
        return sum(m.weights for m in parts) + max(m.scratch + m.inputs_and_outputs for m in parts)

    @cached_property
    def vram(self) -> dict[str, float]:
        """Bytes for each way to keep components on the card."""
        every = [memory.component for memory in self.memory]
        experts = [part for part in every if part in self.request.spec.experts]
        others = [part for part in every if part not in experts]
        ways = {"everything resident": self.vram_bytes(every)}
        if len(experts) > 1:
            ways["one expert resident"] = self.vram_bytes([*others, experts[0]])
        return ways | {"one component at a time": max(self.vram_bytes([part]) for part in every)}

    @property
    def usable_vram_bytes(self) -> float:
        return self.request.target.memory_gib * 2**30 * (1 - VRAM_RESERVED)

    @cached_property
    def fits(self) -> dict[str, bool]:
        return {way: size <= self.usable_vram_bytes for way, size in self.vram.items()}

    # -- time

    @property
    def forwards_per_step(self) -> int:
        return 2 if self.request.guided else 1

    @property
    def step_flops(self) -> float:
        return self.forwards_per_step * dit_flops(self.request.spec.dit, self.tokens).total

    @cached_property
    def step_seconds(self) -> float | None:
        """Roofline of one step: linears and attention each at the peak of their type, or the weights' passage."""
        request, flops = self.request, dit_flops(self.request.spec.dit, self.tokens)
        numbers = (request.precision.linears, request.precision.attention)
        linear_peak, attention_peak = map(request.target.peak_tflops, numbers)
        if not linear_peak or not attention_peak:
            return None
        seconds = flops.linears / linear_peak + (flops.self_attention + flops.cross_attention) / attention_peak
        weights = dit_weights_bytes(request.spec.dit, request.precision) / (request.target.bandwidth_gb_s * 1e9)
        return self.forwards_per_step * max(seconds / 1e12, weights)

    @cached_property
    def video_seconds(self) -> float | None:
        """Text, steps and VAE; the VAE in float32 outside the tensor cores."""
        request, wide = self.request, self.request.target.peak_tflops(Number.FP32)
        if self.step_seconds is None or not wide:
            return None
        text = self.forwards_per_step * text_encoder_flops(request.spec.text_encoder)
        text_peak = request.target.peak_tflops(Number.BF16) or wide
        return request.steps * self.step_seconds + text / (text_peak * 1e12) + self.vae_flops / (wide * 1e12)

    @property
    def vae_flops(self) -> float:
        frames, size = self.latent_shape[2], (self.latent_shape[3], self.latent_shape[4])
        halves = [memory.component for memory in self.memory if memory.component.startswith("vae")]
        encoded = frames if self.request.spec.dit.condition_channels else 1
        return sum(
            vae_flops(self.request.spec.vae, half, size, frames if half == "vae_decoder" else encoded)
            for half in halves
        )

    def as_json(self) -> dict[str, Any]:
        """Every figure with its unit in the key."""
        request, forward = self.request, dit_flops(self.request.spec.dit, self.tokens)
        return {
            "model": request.spec.name,
            "target": request.target.name,
            "precision": str(request.precision),
            "video": list(request.video),
            "tokens": self.tokens,
            "parameters": model_parameters(request.spec),
            "weights_bytes": self.weights_bytes,
            "bundle_bytes": self.bundle_bytes,
            "engines_bytes": self.engines_bytes,
            "export_ram_bytes": EXPORT_RAM_GIB * 2**30,
            "build_ram_bytes": self.build_ram_bytes,
            "disk_bytes": self.bundle_bytes + self.engines_bytes,
            "vram_by_component_bytes": [asdict(memory) for memory in self.memory],
            "vram_bytes": self.vram,
            "usable_vram_bytes": self.usable_vram_bytes,
            "fits": self.fits,
            "forward_pflop": {**{k: v / 1e15 for k, v in asdict(forward).items()}, "total": forward.total / 1e15},
            "step_pflop": self.step_flops / 1e15,
            "video_pflop": (request.steps * self.step_flops + self.vae_flops) / 1e15,
            "steps": request.steps,
            "roofline_step_s": self.step_seconds,
            "roofline_video_s": self.video_seconds,
        }


def make_plan(
    spec: ModelSpec,
    target: Target,
    precision: Precision,
    video: tuple[int, int, int] | None = None,
    steps: int | None = None,
) -> Plan:
    """The plan for ``video`` (width, height, frames; the model's default where not given).

    Raises:
        UserError: a size that the model cannot make, a precision that the target does not compute.
    """
    check_precision(target, precision)
    video = video or (*spec.sampling.sizes[0], spec.sampling.frames)
    spec.latent_shape(*video)
    return Plan(Request(spec, target, precision, video, steps or spec.sampling.steps))


def dit_weights_bytes(spec: DitSpec, precision: Precision) -> float:
    """Of one expert as stored: matrices in ``precision``, what is sensitive in float32, embeddings in between."""
    stored, wide, block = precision.linears.bits / 8, precision.wide.linears.bits / 8, block_parameters(spec)
    width = spec.width
    per_block = stored * block.linear + (4 if precision.quantised else wide) * block.bias + 4 * block.other
    text_and_patch = (spec.text_width + width + 2) * width + (4 * spec.in_channels + 1) * width
    rest = dit_parameters(spec) - spec.layers * block.total - text_and_patch
    return float(spec.layers * per_block + wide * text_and_patch + 4 * rest)


def dit_scratch_bytes(spec: DitSpec, count: int, precision: Precision) -> float:
    """Memory between kernels for ``count`` tokens: the larger of two moments, in rows of D 16-bit numbers.

    Attention: the float32 residual stream (2), the joined q, k, v (3) and the three of them as attention reads them.
    Feed-forward: the residual stream and the hidden rows, in FP8 beside their quantised copy.
    """
    wide = precision.wide.linears.bits / 16  # rows are twice as wide in float32
    hidden = spec.ffn_width / spec.width
    attention = 2 + 3 * wide + 3 * precision.attention.bits / 16
    feed_forward = 2 + ((wide + precision.linears.bits / 16) * hidden if precision.quantised else wide * (1 + hidden))
    return PLANNER_FACTOR * max(attention, feed_forward) * 2.0 * count * spec.width


def _largest_tensor(layers: Iterable[VaeLayer], size: tuple[int, int]) -> float:
    """Elements of the largest tensor that a convolution reads or writes."""
    positions = size[0] * size[1]
    return max(max(x.entering, x.leaving) * x.frames * x.scale**2 * positions for x in layers if x.taps)
