"""The sampling settings of a -Diffusers checkpoint: the boundary in ``model_index.json``, and its scheduler's config.

The checkpoint's values apply, with a warning if they contradict the release with its dimensions. One value is ignored:
the ``flow_shift`` written by the converter from the official layout, which no release is sampled with (wan22.md §0.2).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from export.checkpoint.part_files import read_config
from wan22.errors import UserError, warn_once
from wan22.sampling import SamplingSpec, SolverName
from wan22.specs import TRAIN_TIMESTEPS, ModelSpec

SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"
SOLVERS: dict[str, SolverName] = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++",
    "FlowMatchEulerDiscreteScheduler": "euler",
}


class StatedBoundary(msgspec.Struct):
    """``model_index.json``."""

    boundary_ratio: float | None = None


class SchedulerConfig(msgspec.Struct):
    """``scheduler/scheduler_config.json``; Euler's shift is called ``shift``, the others' ``flow_shift``."""

    class_name: str = msgspec.field(name="_class_name", default="")
    flow_shift: float | None = None
    shift: float | None = None
    num_train_timesteps: int = TRAIN_TIMESTEPS


def converter_shift(spec: ModelSpec) -> float:
    """The ``flow_shift`` that diffusers' converter writes for every checkpoint of this kind."""
    return 5.0 if spec.takes.clean_first_frame else 3.0


def stated_sampling(index: Path, spec: ModelSpec) -> SamplingSpec:
    """The sampling of ``spec`` with the values of the -Diffusers checkpoint of ``model_index.json`` at ``index``.

    Raises:
        UserError: a boundary outside 0…1, a shift that is not positive, another number of timesteps than 1000.
    """
    stated: dict[str, Any] = _boundary(index, spec) | _scheduler(index.parent / SCHEDULER_CONFIG, spec)
    for name, value in stated.items():
        if (usual := getattr(spec.sampling, name)) != value:
            warn_once(f"{index.parent}: {name} {value} where {spec.name} has {usual}; the checkpoint's is used")
    return replace(spec.sampling, **stated)


def _boundary(path: Path, spec: ModelSpec) -> dict[str, Any]:
    ratio = read_config(path, StatedBoundary).boundary_ratio
    if ratio is None:
        return {}
    if len(spec.experts) == 1:
        warn_once(f"{path}: boundary_ratio {ratio:g} of a model with one expert is ignored")
        return {}
    if not 0 <= ratio <= 1:
        raise UserError(f"{path}: boundary_ratio {ratio:g}", "a share of the timesteps, 0 to 1", "fix that file")
    return {"boundary": ratio}


def _scheduler(path: Path, spec: ModelSpec) -> dict[str, Any]:
    """The solver and shift from the config, if this project supports them."""
    if not path.is_file():
        return {}
    config = read_config(path, SchedulerConfig)
    if config.num_train_timesteps != TRAIN_TIMESTEPS:
        found = f"{path}: num_train_timesteps {config.num_train_timesteps}"
        raise UserError(found, f"{TRAIN_TIMESTEPS}", "use a checkpoint of Wan2.2")
    stated: dict[str, Any] = {}
    if config.class_name in SOLVERS:
        stated["solver"] = SOLVERS[config.class_name]
    elif config.class_name:
        warn_once(f"{path}: scheduler {config.class_name} is unknown; {spec.sampling.solver} is used")
    shift = config.shift if stated.get("solver") == "euler" else config.flow_shift
    if shift is not None and shift != converter_shift(spec):
        if not 0 < shift < float("inf"):
            raise UserError(f"{path}: shift {shift:g}", "a finite number above 0", "fix that file")
        stated["shift"] = shift
    return stated
