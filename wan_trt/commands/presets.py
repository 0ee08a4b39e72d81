"""``wan-trt presets``: the named sampling settings."""

from rich.table import Table

from wan22.sampling import ALIASES, PRESETS, presets_for
from wan22.specs import PUBLISHED, ModelSpec
from wan_trt.console import console


def run() -> None:
    """List the named sampling settings of every model with their sources."""
    settings = Table("preset", "model", "solver", "steps", "shift", "experts", "guidance")
    timesteps = Table("preset", "model", "timesteps")
    usable = {spec.name: presets_for(spec.task) for spec in PUBLISHED}
    for name in PRESETS:
        for spec in PUBLISHED:
            if name in usable[spec.name]:
                listed, *row = _settings(spec.with_preset(name))
                settings.add_row(name, spec.name, *row)
                timesteps.add_row(name, spec.name, listed)
    console.print(settings, timesteps)
    for name, preset in PRESETS.items():
        aliases = "".join(f" or {alias}" for alias, of in ALIASES.items() if of == name)
        console.print(f"{name}{aliases}: {preset.source}")


def _settings(spec: ModelSpec) -> tuple[str, ...]:
    """Timesteps, solver, steps, shift, steps of each expert, guidance."""
    from runtime.schedule import make_schedule

    sampling = spec.sampling
    made = make_schedule(sampling.solver, sampling.steps, sampling.shift, sampling.schedule, sampling.sigmas)
    timesteps = made.timesteps.tolist()
    shown = [f"{t:.6g}" for t in timesteps]
    listed = " ".join(shown if len(shown) <= 8 else (*shown[:3], "…", shown[-1]))
    experts = [spec.expert_at(t, step) for step, t in enumerate(timesteps)]
    by = "" if len(spec.experts) == 1 else " by index" if sampling.switch_step is not None else ""
    share = " + ".join(str(experts.count(expert)) for expert in spec.experts)
    guidance = " / ".join(f"{sampling.guidance[expert]:g}" for expert in spec.experts)
    guided = any(scale != 1 for scale in sampling.guidance.values())
    numbers = (str(sampling.steps), f"{sampling.shift:g}", share + by, guidance if guided else "none")
    return listed, sampling.solver, *numbers
