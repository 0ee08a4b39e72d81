"""The memory of a VAE in stages, which takes pictures in strips, and the strips that a budget needs.

Scratch memory was measured on engines of both VAEs at 720p for SM89, and follows the size of the strip exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wan22.costs import motion_parameters, vae_parameters
from wan22.parts import VaeSpec
from wan22.precision import Precision
from wan22.strips import (
    IN_STRIPS,
    VAE_STAGES,
    Edge,
    Half,
    VaeStage,
    caches_of,
    check_strips,
    counts,
    edge_channels,
    edge_scale,
    strips_of,
    widest,
)

# scratch memory over the values of a stage's largest cache, in one frame, in 16 and in 32 bits
SCRATCH: dict[tuple[str, Half], dict[VaeStage, tuple[float, float]]] = {
    ("2.1", "vae_decoder"): {"motion": (6.1, 4.6), "coarse": (7.1, 5.1), "fine": (7.1, 5.1)},
    ("2.1", "vae_encoder"): {"motion": (6.1, 4.6), "coarse": (7.1, 5.6), "fine": (7.1, 5.1)},
    ("2.2", "vae_decoder"): {"motion": (7.1, 5.8), "coarse": (6.6, 6.1), "fine": (6.1, 5.6)},
    ("2.2", "vae_encoder"): {"motion": (6.6, 4.7), "coarse": (7.6, 5.7), "fine": (8.1, 6.1)},
}
MIDDLE_ROWS = 6.1  # rows of channels that the middle holds, beside two matrices of positions by positions
MOTION_FRAMES = 2  # that the largest tensors of this stage have
CHUNK_FRAMES = 4
EDGES: tuple[Edge, ...] = ("pictures", "details")


@dataclass(frozen=True)
class StagedVae:
    """The memory of one half in stages for a video, in bytes."""

    strips: int
    weights: float
    scratch: float
    state: float  # caches, and what passes between stages, at its peak
    work: float  # rows or columns of all strips over those of the picture

    @property
    def total(self) -> float:
        return self.weights + self.scratch + self.state


@dataclass(frozen=True)
class StripChoices:
    """The memory of one half with the strips that matter."""

    half: Half
    precision: Precision
    one: StagedVae
    fitting: StagedVae | None  # the fewest strips that fit the budget
    least: StagedVae  # the fewest strips of those that need the least memory

    def as_json(self) -> dict[str, Any]:
        sizes = {"one_strip": self.one, "fitting": self.fitting, "least": self.least}
        described = {
            name: {"strips": size.strips, "vram_bytes": size.total, "work": size.work} if size else None
            for name, size in sizes.items()
        }
        return {"half": self.half, "precision": str(self.precision), **described}


def stage_scratch_bytes(spec: VaeSpec, half: Half, stage: VaeStage, precision: Precision, positions: int) -> float:
    """The memory between the kernels of one stage for that many positions of the latent grid."""
    bits = precision.linears.bits
    values = max(cache.channels * cache.scale**2 for cache in caches_of(spec, half, stage)[1])
    if stage == "middle":
        return bits / 8 * positions * (2.0 * positions + MIDDLE_ROWS * values)
    factor = SCRATCH[spec.generation, half][stage][bits > 16]
    return factor * bits / 8 * values * positions * (MOTION_FRAMES if stage == "motion" else 1)


@dataclass(frozen=True)
class _Sizes:
    """Sizes by stage, in bytes for all positions of the picture or strip that the stage takes."""

    spec: VaeSpec
    half: Half
    precision: Precision
    whole: tuple[int, int]  # rows and columns of the latent grid
    strip: tuple[int, int]

    @property
    def cached(self) -> int:
        """Bytes of a value in a cache, or between stages on the device."""
        return 2 if self.precision is Precision.FP16 else 4

    def positions(self, stage: VaeStage) -> int:
        rows, columns = self.whole if stage == "middle" else self.strip
        return rows * columns

    def caches(self, stage: VaeStage) -> float:
        values = sum(c.channels * c.frames * c.scale**2 for c in caches_of(self.spec, self.half, stage)[1])
        return float(self.cached * values * self.positions(stage))

    def edges(self, stage: VaeStage) -> float:
        """The main input and output of a stage, and what waits for the stages after it."""
        spec, half, positions = self.spec, self.half, self.positions(stage)
        pictures, details = (
            self.cached * sum(edge_channels(spec, half, edge)) * edge_scale(edge) ** 2 for edge in EDGES
        )
        features = 4 * (spec.decoder_widths[0] if half == "vae_decoder" else spec.encoder_widths[-1])
        pixels = 4 * 3 * spec.spatial_stride**2
        waiting = CHUNK_FRAMES * pictures
        each = {
            "middle": 4 * spec.latent_channels + features + (waiting if self.whole == self.strip else 0),
            "motion": features + waiting * (1 if half == "vae_decoder" else 2),
            "coarse": waiting + pictures + details,
            "fine": waiting + 2 * details + pixels,
        }
        return float(each[stage] * positions)


def staged_vae(
    spec: VaeSpec,
    half: Half,
    precision: Precision,
    latent_shape: tuple[int, ...],
    strips: int,
    *,
    cache_sets: int = 2,
) -> StagedVae:
    """The memory of ``half`` for pictures in ``strips``.

    A stage that takes frame by frame writes half of its caches beside them, and "motion" all of its own. No other stage
    writes meanwhile. On a CPU, where ``cache_sets`` is 1, both overwrite them; but what waits for the last of several
    strips, frames and features, is in the same memory.

    Raises:
        UserError: there are more strips than rows or columns.
    """
    whole = (latent_shape[3], latent_shape[4])
    check_strips(strips, whole)
    sizes = _Sizes(spec, half, precision, whole, widest(spec, half, whole, strips))
    written: dict[VaeStage, float] = dict.fromkeys(VAE_STAGES, 0.0)
    if cache_sets > 1:
        written = {stage: sizes.caches(stage) * (1 if stage == "motion" else 0.5) for stage in VAE_STAGES}
    held = sum(sizes.caches(stage) for stage in IN_STRIPS) + (sizes.caches("middle") if strips == 1 else 0.0)
    in_strips = held + max(written[stage] + sizes.edges(stage) for stage in IN_STRIPS)
    middle = (held if strips == 1 else sizes.caches("middle")) + written["middle"] + sizes.edges("middle")
    if cache_sets == 1 and strips > 1:
        features = 4 * (spec.decoder_widths[0] if half == "vae_decoder" else spec.encoder_widths[-1])
        frames = 12 * CHUNK_FRAMES * spec.spatial_stride**2 if half == "vae_decoder" else 0
        waiting = latent_shape[2] * whole[0] * whole[1] * float(features + frames)
        in_strips, middle = in_strips + waiting, middle + waiting
    parameters = vae_parameters(spec)[half] + motion_parameters(spec, half, first=True)
    return StagedVae(
        strips,
        precision.linears.bits / 8 * parameters,
        max(stage_scratch_bytes(spec, half, stage, precision, sizes.positions(stage)) for stage in VAE_STAGES),
        max(in_strips, middle),
        sum(strip.extent for strip in strips_of(spec, half, max(whole), strips)) / max(whole),
    )


def choices(
    spec: VaeSpec, half: Half, precision: Precision, latent_shape: tuple[int, ...], *, cache_sets: int = 2
) -> Iterator[StagedVae]:
    """The memory of ``half`` in more and more strips."""
    for count in counts((latent_shape[3], latent_shape[4])):
        yield staged_vae(spec, half, precision, latent_shape, count, cache_sets=cache_sets)


def choose_strips(
    spec: VaeSpec,
    half: Half,
    precision: Precision,
    latent_shape: tuple[int, ...],
    available: float,
    *,
    cache_sets: int = 2,
    most: int | None = None,
) -> StagedVae | None:
    """The fewest strips, at most ``most``, with which ``half`` fits into ``available`` bytes; None if none does."""
    sizes = choices(spec, half, precision, latent_shape, cache_sets=cache_sets)
    return next((each for each in sizes if each.total <= available and each.strips <= (most or each.strips)), None)


def strip_choices(
    spec: VaeSpec,
    half: Half,
    precision: Precision,
    latent_shape: tuple[int, ...],
    budget: float,
    *,
    cache_sets: int = 2,
) -> StripChoices:
    """What ``half`` takes in one strip, in ``budget`` bytes and at least."""
    every = list(choices(spec, half, precision, latent_shape, cache_sets=cache_sets))
    fitting = next((each for each in every if each.total <= budget), None)
    return StripChoices(half, precision, every[0], fitting, min(every, key=lambda each: each.total))
