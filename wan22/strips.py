"""The VAE in stages and in strips: what each stage holds, and which rows or columns a strip needs beside its own.

Only attention in the middle of each half looks at the whole picture; every other layer reads a neighbour or two. So the
rest of a half can run on one strip of the picture after the other, with the memory of one. A strip takes in addition a
halo that its own pixels depend on, so what it gives equals that part of the whole picture. Strips divide the longer
side, as each has two halos at most.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from wan22.errors import UserError
from wan22.parts import Cache, VaeSpec

Half = Literal["vae_decoder", "vae_encoder"]
VaeStage = Literal["middle", "motion", "coarse", "fine"]  # in the decoder's order
VAE_STAGES: tuple[VaeStage, ...] = get_args(VaeStage)
IN_STRIPS = VAE_STAGES[1:]  # "middle" attends, so it takes whole pictures
Edge = Literal["pictures", "details"]  # between motion and coarse, between coarse and fine
SIDES = ("strip_height", "strip_width")


@dataclass(frozen=True)
class Strip:
    """Rows or columns of the latent grid: those that a strip gives, and those that it takes, which include a halo."""

    start: int
    stop: int
    low: int
    high: int

    @property
    def extent(self) -> int:
        return self.high - self.low

    @property
    def kept(self) -> slice:
        """The part of what it takes that it gives."""
        return slice(self.start - self.low, self.stop - self.low)


def half_of(name: str) -> Half:
    """The half that a component or a graph of the VAE belongs to."""
    return "vae_decoder" if name.startswith("vae_decoder") else "vae_encoder"


def caches_of(spec: VaeSpec, half: Half, stage: VaeStage) -> tuple[int, tuple[Cache, ...]]:
    """The caches of a stage, and the number of the first in the order of the whole half."""
    if half == "vae_decoder":
        every, in_time, each = spec.decoder_caches, spec.last_in_time + 1, 2 * (spec.blocks_per_stage + 1)
        motion, coarse = 5, 5 + in_time * (each + 1)
        fine = coarse + (len(spec.temporal_down) - in_time) * each
        ends = {"middle": (0, motion), "motion": (motion, coarse), "coarse": (coarse, fine), "fine": (fine, len(every))}
    else:
        every, each = spec.encoder_caches, 2 * spec.blocks_per_stage
        coarse, middle = 1 + each * spec.first_in_time, len(spec.encoder_caches) - 5
        motion = coarse + each
        ends = {"fine": (0, coarse), "coarse": (coarse, motion), "motion": (motion, middle)}
        ends["middle"] = middle, len(every)
    start, stop = ends[stage]
    return start, every[start:stop]


def edge_channels(spec: VaeSpec, half: Half, edge: Edge) -> tuple[int, int]:
    """The channels of a picture between stages, and of what the shortcut around the VAE's stage adds (2.2 only)."""
    if half == "vae_decoder":
        stage = spec.last_in_time if edge == "pictures" else len(spec.temporal_down) - 1
        width, beside = spec.decoder_widths[stage + 1], spec.decoder_stage_input(stage)
    else:
        width, beside = spec.encoder_widths[spec.first_in_time + 1], spec.encoder_widths[spec.first_in_time]
        if edge == "details":
            return beside, 0
    return width, beside if spec.residual else 0


def edge_scale(edge: Edge) -> int:
    """Rows and columns of an edge over those of the latent grid."""
    return 2 if edge == "pictures" else 4


def halo(spec: VaeSpec, half: Half) -> tuple[int, int]:
    """The latent rows or columns that a strip takes before and behind its own.

    Every convolution spoils a row or column beside a cut, and doubling or halving sides does the same to those spoilt;
    a halving convolution reads two further ones behind.
    """
    stages = len(spec.temporal_down) + 1
    if half == "vae_decoder":
        spoilt = 0
        for stage in range(stages):
            spoilt += 2 * (spec.blocks_per_stage + 1)
            if stage < stages - 1:
                spoilt = 2 * spoilt + 1
        spoilt = -(-(spoilt + 1) // 2 ** (stages - 1))
        return spoilt, spoilt
    before = behind = 1
    for stage in range(stages):
        before, behind = before + 2 * spec.blocks_per_stage, behind + 2 * spec.blocks_per_stage
        if stage < stages - 1:
            before, behind = (before + 1) // 2, behind // 2 + 1
    return before, behind


def strips_of(spec: VaeSpec, half: Half, side: int, count: int) -> list[Strip]:
    """``side`` rows or columns of the latent grid in ``count`` strips of about the same number of their own."""
    before, behind = halo(spec, half)
    ends = [side * index // count for index in range(count + 1)]
    return [
        Strip(start, stop, max(0, start - before), min(side, stop + behind)) for start, stop in itertools.pairwise(ends)
    ]


def check_strips(count: int, size: tuple[int, int]) -> None:
    """Refuse more strips than the latent grid of ``size`` has rows or columns on its longer side.

    Raises:
        UserError: names the largest number.
    """
    if not 1 <= count <= max(size):
        unit = "columns" if cut_axis(size) else "rows"
        found = f"--vae-strips {count} for a video of {max(size)} latent {unit}"
        raise UserError(found, f"1 to {max(size)}", f"use --vae-strips {max(size) if count > 1 else 1} or auto")


def cut_axis(size: tuple[int, int]) -> int:
    """0 if strips of a latent grid of ``size`` (rows, columns) are rows, 1 if columns."""
    return int(size[1] >= size[0])


def widest(spec: VaeSpec, half: Half, size: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of the largest strip of ``count``, with its halo."""
    axis = cut_axis(size)
    extent = max(strip.extent for strip in strips_of(spec, half, size[axis], count))
    return (extent, size[1]) if axis == 0 else (size[0], extent)


def counts(size: tuple[int, int]) -> Iterator[int]:
    """The numbers of strips worth trying: each makes strips narrower than the one before."""
    last = 0
    for count in range(1, max(size) + 1):
        if (own := -(-max(size) // count)) != last:
            yield count
        last = own
