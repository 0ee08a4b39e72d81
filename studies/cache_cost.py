"""What a step cache itself costs at full size: its time in a computed step, and the memory that it keeps.

    python -m studies.cache_cost

The arrays have the real shape, so neither weights nor a GPU are needed. The time is that of one core here, beside the
roofline of a step, which no engine beats. With GPU engines the arrays are on the GPU, whose memory is a hundred times
faster, so there the share is smaller still; it was not measured.
"""

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from engines.plan import make_plan
from engines.targets import target_named
from runtime.noise import standard_normal
from runtime.schedule import make_schedule
from runtime.step_cache import StepCache
from validate.bench.step_cache import overhead_s
from wan22.caching import Caching
from wan22.precision import Precision
from wan22.quantities import human_bytes
from wan22.specs import spec_named
from wan_trt.arguments import Frames, Size, size_of
from wan_trt.console import console
from wan_trt.guard import command_of

PROGRAM = "python -m studies.cache_cost"
TARGETS = ("rtx4090", "rtx5090", "h100", "b200")
CACHES = {
    "easy": Caching(easy=True),
    "easy, hold": Caching(easy=True, reuse="hold"),
    "easy, taylor1": Caching(easy=True, reuse="taylor1"),
    "magcache": Caching(skip_steps=(11, 12)),
    "late-cfg": Caching(late_cfg="auto"),
    "magcache, late-cfg": Caching(skip_steps=(11, 12), late_cfg="auto"),
    "easy, late-cfg": Caching(easy=True, late_cfg="auto"),
    "easy, taylor1, late-cfg": Caching(easy=True, reuse="taylor1", late_cfg="auto"),
}


def run(
    model: Annotated[str, typer.Option(help="The model whose latents and steps are meant.")] = "t2v-a14b",
    size: Size = "1280x720",
    frames: Frames = 81,
) -> None:
    """Measure the bookkeeping of step caches on latents of a real size."""
    spec, video = spec_named(model), (*(size_of(size) or (1280, 720)), frames or 81)
    latents = standard_normal(spec.latent_shape(*video), 0)
    rooflines = {name: make_plan(spec, target_named(name), Precision.FP8_ATTN, video).step_seconds for name in TARGETS}
    title = "{}x{}, {} frames: share of a computed step in fp8-attn at its roofline".format(*video)
    shown = Table("step cache", "one core", "keeps", "latents", *TARGETS, title=title)
    for name, settings in CACHES.items():
        seconds, held = cost(settings, latents)
        shares = [f"{seconds / step:.2%}" if step else "" for step in rooflines.values()]
        shown.add_row(name, f"{1000 * seconds:.1f} ms", human_bytes(held), f"{held / latents.nbytes:.1f}", *shares)
    console.print(shown)
    console.print(f"roofline steps: {', '.join(f'{name} {step:.1f} s' for name, step in rooflines.items() if step)}")


def cost(settings: Caching, latents: np.ndarray) -> tuple[float, int]:
    """Seconds in a computed step, and the most bytes kept between steps."""
    schedule, steps = make_schedule("unipc", 40, 12.0), 5
    cache = StepCache(settings, schedule.sigmas[:-1].tolist(), ["dit"] * 40)
    held = 0
    for step in range(steps):
        conditional, velocity = (np.float32(step + scale) * latents for scale in (1, 2))
        cache.skips(step)
        cache.residual(step)
        cache.observe(step, latents.copy(), conditional, velocity)
        cache.moved(latents, velocity)
        held = max(held, cache.held_bytes)
    return overhead_s(cache, latents), held


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
