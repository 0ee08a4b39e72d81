"""The solver by itself: ours on the velocities of another run, which leaves no room for the transformer's error."""

from collections.abc import Sequence

from validate.ladder import thresholds
from validate.ladder.comparison import Climb
from validate.ladder.metrics import Metrics, compare
from validate.ladder.row import Row
from validate.reference.whole_run import ReferenceStep


def solved(name: str, climb: Climb, steps: Sequence[ReferenceStep]) -> Row:
    """Of all steps the one where both are farthest apart; a step that cannot be compared is farther than any."""
    velocities = (step.velocity for step in steps)
    ours = climb.ours.solved(climb.request, steps[0].before, velocities, climb.given.first_frame)
    compared = [compare(latents, step.after) for latents, step in zip(ours, steps, strict=True)]
    worst = max(range(len(steps)), key=lambda index: _apart(compared[index]))
    note = f"{climb.request.solver}, farthest after step {worst + 1} of {len(steps)}"
    return Row(name, "sampler", compared[worst], thresholds.SOLVER, note)


def _apart(metrics: Metrics) -> float:
    return float("inf") if metrics.problem else metrics.relative_l2
