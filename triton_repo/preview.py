"""What unfinished latents will become, without asking the model again.

Between two steps of a flow-matching run the latents move along the model's velocity: ``v ≈ (x₁ - x₀) / (σ₁ - σ₀)``,
whatever the solver. Following it to σ = 0 gives ``x₁ - σ₁ v``, the clean latents that the last step pointed to.
"""

from runtime.arrays import F32


def clean_estimate(before: F32 | None, latents: F32, sigmas: F32, index: int) -> F32 | None:
    """Where the step from ``before`` to ``latents`` points to at sigma 0; ``latents`` itself after the last step.

    Args:
        before: latents after step ``index - 1``; None before the second step, when there is no estimate.
        latents: after step ``index``, ``[1, z, T, h, w]``.
        sigmas: of the run, ``[N + 1]``, falling to 0.
        index: from 0.
    """
    at, to = float(sigmas[index]), float(sigmas[index + 1])
    if to == 0:
        return latents
    if before is None:
        return None
    estimate: F32 = latents - to / (to - at) * (latents - before)
    return estimate
