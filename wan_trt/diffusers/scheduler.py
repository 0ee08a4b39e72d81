"""``pipe.scheduler``: a configuration as diffusers has it, read and set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from wan22.errors import UserError
from wan22.sampling import SolverName

SOLVERS: Mapping[str, SolverName] = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
SCHEDULERS = {solver: name for name, solver in SOLVERS.items()}
# What the solvers here implement; another value in a scheduler's config is refused.
IMPLEMENTED = {
    "num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2,
    "solver_type": ("bh2", "midpoint"), "algorithm_type": "dpmsolver++", "predict_x0": True, "thresholding": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_dynamic_shifting": False, "stochastic_sampling": False, "invert_sigmas": False, "shift_terminal": None,
}  # fmt: skip


class Config(dict[str, Any]):
    """A mapping whose entries are attributes too, as diffusers' configurations are."""

    __getattr__ = dict.__getitem__


@dataclass(frozen=True)
class Scheduler:
    """What ``pipe.scheduler`` shows: a configuration that diffusers' ``from_config`` takes."""

    config: Config


def scheduler_of(solver: SolverName, shift: float) -> Scheduler:
    """The scheduler of diffusers that ``solver`` is, with its shift."""
    name = SCHEDULERS.get(solver, SCHEDULERS["euler"])
    common = Config(_class_name=name, num_train_timesteps=1000)
    if name == SCHEDULERS["euler"]:
        return Scheduler(Config(common, shift=shift))
    common |= Config(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    return Scheduler(Config(common, flow_shift=shift))


def settings_of(scheduler: Any) -> dict[str, Any]:
    """A request's solver, shift and grid as in ``scheduler``, one of diffusers' or of :func:`scheduler_of`.

    Raises:
        UserError: another scheduler, or one set to something that no solver here computes.
    """
    config = cast(Mapping[str, Any], scheduler.config)
    name = config.get("_class_name") or type(scheduler).__name__
    if name not in SOLVERS:
        raise UserError(f"scheduler {name}", f"one of {', '.join(SOLVERS)}", "choose one of these")
    for key, right in IMPLEMENTED.items():
        if key in config and config[key] not in (right if isinstance(right, tuple) else (right,)):
            found = f"scheduler with {key} {config[key]!r}"
            raise UserError(found, f"{right!r}", "make it from pipe.scheduler.config")
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {"solver": SOLVERS[name], "shift": float(shift), "schedule": "diffusers"}
