"""Why a job did not make a video → what happens to it: it goes back into the queue, or fails with a stable code."""

from dataclasses import dataclass

from triton_repo.client_errors import JobError


@dataclass(frozen=True)
class Outcome:
    code: str  # "" gives the job back
    message: str = ""
    lost: bool = False  # the server died of it, or with it


def outcome_of(error: JobError, *, started: bool) -> Outcome:
    """What ``error`` of a served job means; ``started`` if the model had begun it."""
    found, known = error.reason.found, _KNOWN.get(error.status)
    if known is not None:
        return Outcome(*known)
    if error.status == "INVALID_ARGUMENT":
        return Outcome("invalid_request", str(error))
    if error.status == "INTERNAL":
        if error.reason.expected == "finite numbers":
            return Outcome("non_finite", "the model computed NaN or infinity")
        if found.startswith("out of memory"):
            return Outcome("out_of_memory", "out of memory | try a smaller size or fewer frames")
        if found == "the job failed":  # a bug or a broken device; another server may be sound
            return Outcome("", "the model failed", lost=True)
    return Outcome("", "the server ended before the job did", lost=started)


_KNOWN = {
    "DEADLINE_EXCEEDED": ("timeout", "the job ran longer than it may"),
    "CANCELLED": ("", "the server let the job go"),  # not for its client, who is not asked here
}
