"""The memory, disk space and time that a model needs on a target, without weights or a GPU: ``wan-trt plan``.

Sizes are those of :mod:`wan22.residency`. Times are rooflines: no run is faster, and real runs are often half as fast.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from engines.block_plan import BlockPlan
from engines.disk_space import kernel_bytes
from engines.targets import TARGETS, Target, check_precision
from wan22.backends import runs_graphs
from wan22.costs import branch_flops, dit_flops, model_parameters, text_encoder_flops, vae_flops
from wan22.errors import UserError
from wan22.precision import Number, Precision
from wan22.residency import (
    VRAM_RESERVED,
    Memory,
    Residency,
    choose_residency,
    dit_scratch_bytes,
    dit_weights_bytes,
    engines_memory,
    largest_fitting,
    needed_bytes,
    refusal,
    text_encoder_weights_bytes,
    usual_precisions,
)
from wan22.specs import ModelSpec, tokens
from wan22.strips import Half, half_of
from wan22.vae_memory import StripChoices, strip_choices

__all__ = ["Plan", "Request", "dit_scratch_bytes", "dit_weights_bytes", "make_plan"]

WAYS: dict[Residency, str] = {
    "all": "everything resident",
    "one-expert": "one expert resident",
    "one-component": "one component at a time",
}
EXPORT_RAM_GIB = 2.0  # exports stream tensor by tensor; the largest is the text encoder's embedding
BUILD_RAM_FACTOR = 1.5  # ratio of anonymous memory to weights with streamed serialisation; file pages are evictable
BUILD_RAM_GIB = 1.0  # the builder itself


@dataclass(frozen=True)
class Request:
    spec: ModelSpec
    target: Target
    precision: Precision
    video: tuple[int, int, int]  # width, height in pixels; frames
    steps: int
    guided: bool = True  # two forwards per step
    vram: float | None = None  # bytes that a component in blocks may take; None: what the card has
    bus_gb_s: float | None = None  # from host memory; None: the target's
    low_rank: int = 0  # of the branches beside NVFP4 matrices


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
        """Sizes in the bundle, by part: the VAE in float32, the text encoder never below 16 bits."""
        spec, precision, rank = self.request.spec, self.request.precision, self.request.low_rank
        text = text_encoder_weights_bytes(spec.text_encoder, self.precisions["text_encoder"])
        sizes = {"text_encoder": text} | dict.fromkeys(spec.experts, dit_weights_bytes(spec.dit, precision, rank))
        return {part: sizes.get(part, 4.0 * count) for part, count in model_parameters(spec).items()}

    @property
    def bundle_bytes(self) -> float:
        return sum(self.weights_bytes.values())

    @property
    def engines_bytes(self) -> float:
        if runs_graphs(self.request.target.backend):
            return self.bundle_bytes
        return sum(each.weights + kernel_bytes(self.request.spec, each.component) for each in self.memory)

    @property
    def build_ram_bytes(self) -> float:
        if self.request.target.backend == "onnxruntime-gpu":  # rewrites graphs without their weights
            return BUILD_RAM_GIB * 2**30
        inside = self.weights_bytes
        if self.has_blocks:  # the compiler sees the weights of the VAE alone
            inside = {part: size for part, size in inside.items() if part.startswith("vae")}
        return BUILD_RAM_FACTOR * max(inside.values()) + BUILD_RAM_GIB * 2**30

    # -- on the GPU

    @cached_property
    def memory(self) -> list[Memory]:
        """The memory of every engine."""
        request = self.request
        return list(engines_memory(request.spec, self.precisions, request.video, low_rank=request.low_rank).values())

    @cached_property
    def precisions(self) -> dict[str, Precision]:
        """The precision of every component in an export for the target."""
        request = self.request
        text = request.target.text_encoder_precision(request.precision)
        return usual_precisions(request.spec, request.precision) | {"text_encoder": text}

    @cached_property
    def needed(self) -> dict[Residency, float]:
        """Bytes of GPU memory for each residency."""
        return needed_bytes(self.request.spec, {memory.component: memory for memory in self.memory})

    @property
    def vram(self) -> dict[str, float]:
        """:attr:`needed` with the residencies in words."""
        return {WAYS[way]: size for way, size in self.needed.items()}

    @property
    def residency(self) -> Residency | None:
        """The choice of ``--residency auto`` on an otherwise empty card; None if nothing fits."""
        return choose_residency(self.needed, self.usable_vram_bytes)

    @property
    def refusal(self) -> UserError:
        """The error if nothing fits, with the video that would fit."""
        request, memory = self.request, {each.component: each for each in self.memory}
        given, room = (request.spec, self.precisions, request.video), self.usable_vram_bytes
        return refusal(self.needed, memory, room, largest_fitting(*given, room, low_rank=request.low_rank))

    @property
    def usable_vram_bytes(self) -> float:
        return self.request.target.memory_gib * 2**30 * (1 - VRAM_RESERVED)

    @cached_property
    def fits(self) -> dict[str, bool]:
        return {way: size <= self.usable_vram_bytes for way, size in self.vram.items()}

    @property
    def has_blocks(self) -> bool:
        """True if engines for the target are in blocks unless ``--topology whole`` is given."""
        return not runs_graphs(self.request.target.backend)

    @cached_property
    def in_blocks(self) -> BlockPlan:
        """The choice of engines in blocks."""
        request, text = self.request, self.precisions["text_encoder"]
        usable = self.usable_vram_bytes if request.vram is None else request.vram
        forward = None if self.step_seconds is None else self.step_seconds / self.forwards_per_step
        bus = request.bus_gb_s or request.target.bus_gb_s
        return BlockPlan(request.spec, request.precision, text, self.tokens, usable, bus, forward, request.low_rank)

    # -- the VAE in stages

    @cached_property
    def staged_vae(self) -> list[StripChoices]:
        """Every half in stages, in the precision of its engines, and the decoder in 16 bits."""
        halves = dict.fromkeys(half_of(name) for name in self.precisions if name.startswith("vae"))
        usual = [(half, self.precisions[f"{half}_first"]) for half in halves]
        wanted = dict.fromkeys((*usual, ("vae_decoder", Precision.FP16)))
        return [self._staged_vae(half, precision) for half, precision in wanted]

    @property
    def half_precision_decoder(self) -> StripChoices:
        """The decoder in stages, in 16 bits."""
        return next(each for each in self.staged_vae if each.precision is Precision.FP16)

    def _staged_vae(self, half: Half, precision: Precision) -> StripChoices:
        request, sets = self.request, 1 if self.request.target.backend == "onnxruntime" else 2
        spec, shape = request.spec.vae, self.latent_shape
        if half == "vae_encoder" and not request.spec.dit.condition_channels:
            shape = (*shape[:2], 1, *shape[3:])  # it encodes one image
        budget = self.usable_vram_bytes if request.vram is None else request.vram
        return strip_choices(spec, half, precision, shape, budget, cache_sets=sets)

    # -- time

    @property
    def forwards_per_step(self) -> int:
        return 2 if self.request.guided else 1

    @property
    def step_flops(self) -> float:
        return self.forwards_per_step * dit_flops(self.request.spec.dit, self.tokens).total

    @cached_property
    def step_seconds(self) -> float | None:
        """Roofline of one step: linears and attention at the peaks of their types, or reading the weights if slower."""
        request, flops = self.request, dit_flops(self.request.spec.dit, self.tokens)
        precision, peak = request.precision, request.target.peak_tflops
        work = (
            (flops.feed_forward, peak(precision.linears)),
            (flops.linears - flops.feed_forward, peak(precision.beside_feed_forward)),
            (flops.self_attention + flops.cross_attention, peak(precision.attention)),
            (branch_flops(request.spec.dit, self.tokens, precision, request.low_rank), peak(Number.BF16)),
        )
        if not all(rate for flop, rate in work if flop):
            return None
        weights = self.weights_bytes[request.spec.experts[0]] / (request.target.bandwidth_gb_s * 1e9)
        return self.forwards_per_step * max(sum(flop / rate for flop, rate in work if rate) / 1e12, weights)

    @cached_property
    def video_seconds(self) -> float | None:
        """Roofline of text encoder, steps and VAE; the VAE runs in float32 outside the tensor cores."""
        request, wide = self.request, self.request.target.peak_tflops(Number.FP32)
        if self.step_seconds is None or not wide:
            return None
        text = self.forwards_per_step * text_encoder_flops(request.spec.text_encoder)
        text_peak = request.target.peak_tflops(Number.BF16) or wide
        return request.steps * self.step_seconds + text / (text_peak * 1e12) + self.vae_flops / (wide * 1e12)

    @property
    def vae_flops(self) -> float:
        frames, size = self.latent_shape[2], (self.latent_shape[3], self.latent_shape[4])
        encoded = frames if self.request.spec.dit.condition_channels else 1
        lengths = {n: frames if n == "vae_decoder" else encoded for n in self.weights_bytes if n.startswith("vae")}
        return sum(vae_flops(self.request.spec.vae, half, size, length) for half, length in lengths.items())

    def as_json(self) -> dict[str, Any]:
        """Every figure with its unit in the key."""
        request, forward = self.request, dit_flops(self.request.spec.dit, self.tokens)
        return {
            "model": request.spec.name,
            "target": request.target.name,
            "precision": str(request.precision),
            "low_rank": request.low_rank,
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
            "residency": self.residency,
            **self.in_blocks.as_json(),
            "vae_in_stages": [each.as_json() for each in self.staged_vae],
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
    vram: float | None = None,
    bus_gb_s: float | None = None,
) -> Plan:
    """The plan for ``video`` (width, height, frames; the model's default if None).

    Raises:
        UserError: the model does not support the size, or the target does not support the precision.
    """
    check_precision(target, precision)
    video = video or (*spec.sampling.sizes[0], spec.sampling.frames)
    spec.latent_shape(*video)
    return Plan(Request(spec, target, precision, video, steps or spec.sampling.steps, True, vram, bus_gb_s))


def card_plans(
    spec: ModelSpec,
    precision: Precision | None,
    video: tuple[int, int, int] | None = None,
    steps: int | None = None,
    bus_gb_s: float | None = None,
) -> list[Plan]:
    """The plans for the cards of :mod:`engines.targets`, the smallest first.

    Args:
        spec: the model.
        precision: only cards that compute in it; None: all, each in its recommended precision.
        video: as for :func:`make_plan`.
        steps: as for :func:`make_plan`.
        bus_gb_s: from host memory; None: each card's own.

    Raises:
        UserError: the model does not support the size.
    """
    cards = [t for t in TARGETS.values() if not runs_graphs(t.backend) and precision in (None, *t.precisions)]
    plans = [make_plan(spec, t, precision or t.recommended_precision, video, steps, None, bus_gb_s) for t in cards]
    return sorted(plans, key=lambda plan: (plan.request.target.memory_gib, plan.step_seconds or 0.0))
