"""``wan-trt presets``: the sampling settings that have a name."""

from rich.table import Table

from wan22.sampling import ALIASES, PRESETS, presets_for
from wan22.specs import PUBLISHED, ModelSpec
from wan_trt.console import console


def run() -> None:
    """List the presets of generate, validate, export and client, per model, with their source."""
    table = Table("preset", "model", "solver", "steps", "shift", "timesteps", "experts", "guidance", "source")
    usable = {spec.name: presets_for(spec.task) for spec in PUBLISHED}
    for name, preset in PRESETS.items():
        aliases = [alias for alias, of in ALIASES.items() if of == name]
        called = "\n".join((name, *(f"or {alias}" for alias in aliases)))
        for spec in PUBLISHED:
            if name in usable[spec.name]:
                table.add_row(called, *_settings(spec.with_preset(name)), preset.source)
    console.print(table)


def _settings(spec: ModelSpec) -> tuple[str, ...]:
    """Everything between a preset's name and its source."""
    from runtime.schedule import make_schedule

    sampling = spec.sampling
    made = make_schedule(sampling.solver, sampling.steps, sampling.shift, sampling.schedule, sampling.sigmas)
    timesteps = made.timesteps.tolist()
    shown = [f"{t:.6g}" for t in timesteps]
    listed = " ".join(shown if len(shown) <= 8 else (*shown[:3], "…", shown[-1]))
    experts = [spec.expert_at(t, step) for step, t in enumerate(timesteps)]
    by = "" if len(spec.experts) == 1 else " by index" if sampling.switch_step is not None else " by timestep"
    share = " + ".join(str(experts.count(expert)) for expert in spec.experts)
    guidance = " / ".join(f"{sampling.guidance[expert]:g}" for expert in spec.experts)
    guided = any(scale != 1 for scale in sampling.guidance.values())
    numbers = (str(sampling.steps), f"{sampling.shift:g}", listed, share + by, guidance if guided else "none")
    return spec.name, sampling.solver, *numbers
