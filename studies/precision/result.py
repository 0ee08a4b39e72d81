"""The result of a precision study, in the order of its report."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from export.precisions import LINEARS
from studies.precision.attention import AttentionError
from studies.precision.outliers import Range
from studies.precision.variants import Variant
from validate.gate import distinct_text
from validate.report.to_json import json_number

COLLAPSE = 0.1  # from this relative L2 error of a velocity, a run no longer follows the model
LARGEST_FP16 = 65504.0
LONG = 2.0  # ratio of as_written to as_fused from which the order of the two operations matters


@dataclass(frozen=True)
class VariantResult:
    """One variant's run. ``errors`` are those of single velocities at the float32 run's latents, one per step."""

    variant: Variant
    errors: tuple[float, ...]
    psnr_db: float  # PSNR of the final latents of the variant's run over their range; NaN if the run failed
    seconds: float  # per forward
    problem: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors, key=lambda error: math.inf if math.isnan(error) else error)

    @property
    def collapsed(self) -> bool:
        return bool(self.problem) or not self.worst < COLLAPSE

    @property
    def verdict(self) -> str:
        if self.collapsed:
            return "collapses"
        if self.variant.ablation:
            return "cannot be exported"
        return "meets its aim" if self.worst <= self.variant.aim else "misses its aim"

    def percent(self, error: float) -> str:
        """``error`` as text with enough digits to differ from an aim that it misses."""
        return distinct_text(error, self.variant.aim, lambda value, more: f"{value:.{2 + more}%}")

    @property
    def aim(self) -> str:
        return "" if self.variant.ablation else f"{self.variant.aim:.2%}"

    @property
    def tone(self) -> str:
        return {"collapses": "bad", "misses its aim": "bad", "meets its aim": "good"}.get(self.verdict, "")


@dataclass(frozen=True)
class PartError:
    """Fewer bits in a single place; ``error`` is that of the first velocity.

    In ``name``, a comma precedes what is omitted.
    """

    name: str
    error: float


@dataclass(frozen=True)
class Statistic:
    """Magnitudes over the blocks of the real model, and of the twin in the float32 run."""

    what: str
    real: Range
    twin: Range


@dataclass(frozen=True)
class Magnitude:
    """The largest magnitudes of a block in the bfloat16 run."""

    expert: str
    block: int
    kept: float  # the largest that the graph keeps in 16 bits
    where: str  # the node of ``kept``
    residual: float  # after the block, in float32

    @property
    def headroom(self) -> float:
        """The factor by which ``kept`` could grow in float16."""
        return LARGEST_FP16 / self.kept if self.kept else math.inf


@dataclass(frozen=True)
class Study:
    """The results of a study; false if a precision that can be exported collapses."""

    facts: Mapping[str, str]
    timesteps: tuple[float, ...]
    results: tuple[VariantResult, ...]
    parts: tuple[PartError, ...]
    magnitudes: tuple[Magnitude, ...]
    statistics: tuple[Statistic, ...]
    attention: tuple[AttentionError, ...]

    def __bool__(self) -> bool:
        return not any(result.collapsed for result in self.results if not result.variant.ablation)

    @property
    def misses(self) -> list[str]:
        """Precisions that can be exported and miss their aim without collapsing."""
        return [result.variant.name for result in self.results if result.verdict == "misses its aim"]

    @property
    def tone(self) -> str:
        """Of the verdict's box: "good" only where every precision that can be exported meets its aim."""
        return "good" if self and not self.misses else "bad"

    @property
    def sentences(self) -> list[str]:
        """The findings in words, bad ones first."""
        found = []
        for verdict in ("collapses", "misses its aim", "meets its aim"):
            for result in self.results:
                if result.verdict == verdict:
                    aim = f", aim {result.aim}" if result.aim else ""
                    worst = result.percent(result.worst)
                    causes = self._causes(result.variant) if verdict == "misses its aim" else ""
                    found.append(f"{result.variant.name} {verdict}: {worst} in the worst step{aim}{causes}")
        errors = {part.name: part.error for part in self.parts}
        ablated = {name: error for name, error in errors.items() if ", " in name}
        for name, error in ablated.items():
            found.append(f"{name}: {error:.2%} instead of {errors[name.split(', ')[0]]:.2%}")
        return found + self._long_sequences()

    @property
    def largest_part(self) -> float:
        return max(part.error for part in self.parts)

    def _causes(self, variant: Variant) -> str:
        """What each linear of ``variant`` costs if it alone has its number type, the largest first."""
        made, errors = variant.quantised, {part.name: part.error for part in self.parts}
        if made is None:
            return ""
        alone = {linear: errors.get(f"{made.number(f'blocks.0.{linear}')} in {linear}") for linear in LINEARS}
        found = sorted(((error, linear) for linear, error in alone.items() if error is not None), reverse=True)
        return "; alone " * bool(found) + ", ".join(f"{linear} {error:.1%}" for error, linear in found)

    def _long_sequences(self) -> list[str]:
        worst = max(self.attention, key=lambda error: error.as_written, default=None)
        if worst is None or worst.as_written < LONG * worst.as_fused:
            return []
        return [
            f"over {worst.tokens} tokens, FP8 probabilities alone cause an error of {worst.as_written:.1%} if a kernel "
            f"normalises before it quantises, as in the graph, and {worst.as_fused:.1%} if after, as fused kernels do"
        ]

    def table(self) -> Table:
        headings = ("precision", "median", "worst step", "aim", "latents", "verdict")
        table = Table(*headings, title="Velocity error, relative L2")
        shades = {"collapses": "red", "misses its aim": "yellow", "meets its aim": "green"}
        for result in self.results:
            velocity = f"{median(result.errors):.2%}", result.percent(result.worst), result.aim
            latents = "broke" if result.problem else f"{result.psnr_db:.1f} dB"
            verdict = Text(result.verdict, shades.get(result.verdict, "dim"))
            table.add_row(result.variant.name, *velocity, latents, verdict)
        return table

    def as_json(self) -> bytes:
        content = {
            "passed": bool(self),
            "findings": self.sentences,
            "facts": dict(self.facts),
            "timesteps": self.timesteps,
            "results": [_result(result) for result in self.results],
            "parts": [{"alone": part.name, "relative_l2": json_number(part.error)} for part in self.parts],
            "magnitudes": [asdict(m) | {"fp16_headroom": json_number(m.headroom)} for m in self.magnitudes],
            "statistics": [asdict(statistic) for statistic in self.statistics],
            "attention": [asdict(error) for error in self.attention],
        }
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _result(result: VariantResult) -> dict[str, Any]:
    return {
        "name": result.variant.name,
        "verdict": result.verdict,
        "aim_relative_l2": result.variant.aim,
        "relative_l2_per_step": [json_number(error) for error in result.errors],
        "latents_psnr_db": json_number(result.psnr_db),
        "ablation": result.variant.ablation,
        "made": result.variant.how,
        "note": result.variant.note,
        "problem": result.problem,
        "seconds_per_forward": round(result.seconds, 3),
    }
