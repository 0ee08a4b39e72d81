"""What each precision costs in accuracy and kernels: figures that ``python -m studies.precision --write`` measures.

Errors are those of small twins of the models with outliers as large as the real ones' (docs/figures.md). Of a trained
model they can only be measured on that model: ``wan-trt calibrate`` and ``wan-trt validate`` do.
"""

from pathlib import Path

import msgspec

from engines.plan import Plan, make_plan
from engines.targets import Target
from wan22.precision import Precision
from wan22.specs import ModelSpec

FILE = Path(__file__).parent / "precision_figures.json"


class PrecisionFigures(msgspec.Struct, frozen=True):
    """The figures of one precision, by twin ("ti2v-5b") and by target ("rtx4090")."""

    precision: Precision
    aim: float  # relative L2 error of a velocity
    velocity: dict[str, float]  # error of the worst step
    latents_db: dict[str, float]  # PSNR of finished latents
    kernels: dict[str, tuple[int, ...]] = {}  # of qkv, attend and rest, in a block of T2V-A14B at 720p

    @property
    def worst(self) -> float:
        return max(self.velocity.values())

    @property
    def meets_aim(self) -> bool:
        return self.worst <= self.aim


def read_figures(path: Path = FILE) -> dict[Precision, PrecisionFigures]:
    """The measured figures by precision; those without an error, such as fp32, have none."""
    found = msgspec.json.decode(path.read_bytes(), type=list[PrecisionFigures])
    return {each.precision: each for each in found}


def write_figures(path: Path, figures: list[PrecisionFigures]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")


def compare_precisions(
    spec: ModelSpec, target: Target, video: tuple[int, int, int] | None = None, steps: int | None = None
) -> list[Plan]:
    """The plans in all precisions of ``target``, the slowest first.

    Raises:
        UserError: the model does not support the size.
    """
    plans = [make_plan(spec, target, precision, video, steps) for precision in target.precisions]
    return sorted(plans, key=lambda plan: -(plan.step_seconds or 0.0))
