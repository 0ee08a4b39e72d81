"""A job → the JSON objects that clients get."""

import json
import time
from typing import Any

from gateway.jobs import Job, Wait

LEAST_POLL_MS, MOST_POLL_MS = 500, 5000


def video_object(job: Job, wait: Wait | None = None) -> dict[str, Any]:
    """OpenAI's video object with the effective values of the request, and how far the job is.

    Args:
        job: its row.
        wait: its place in the queue, if it waits.
    """
    echo = json.loads(job["echo"])
    failed = job["status"] == "failed"
    running = job["status"] == "in_progress"
    return {
        "id": job["id"],
        "object": "video",
        "model": job["model"],
        "status": job["status"],
        "progress": job["progress"],
        "created_at": int(job["created_at"]),
        "completed_at": _seconds(job["completed_at"]),
        "expires_at": _seconds(job["expires_at"]),
        **{name: echo.pop(name) for name in ("prompt", "size", "seconds")},
        "remixed_from_video_id": None,
        "error": {"code": job["error_code"], "message": job["error_message"]} if failed else None,
        "phase": job["phase"],
        "step": job["step"],
        "steps": job["steps"] if job["steps"] is not None else echo["num_inference_steps"],
        "expert": job["expert"] if running else None,
        "queue_position": wait.position if wait else None,
        "eta_seconds": _rounded(wait.eta_s if wait else job["eta_s"] if running else None),
        "seconds_in_phase": _rounded(max(0.0, time.time() - job["phase_at"])) if running or wait else None,
        "started_at": _seconds(job["started_at"]),
        **{name: value for name, value in echo.items() if name != "model"},
    }


def event_object(job_id: str, data: dict[str, Any]) -> dict[str, Any]:
    """What a progress event tells."""
    told = {name: value for name, value in data.items() if name != "eta_s"}
    return {"id": job_id, "object": "video.progress", **told, "eta_seconds": _rounded(data.get("eta_s"))}


def poll_after_ms(job: Job) -> int | None:
    """How soon a poll may bring something new: about a step; None for a job that has ended."""
    if job["status"] == "queued":
        return 2000
    if job["status"] != "in_progress":
        return None
    step_s = (time.time() - job["started_at"]) / job["step"] if job["step"] and job["started_at"] else 1.0
    return int(min(MOST_POLL_MS, max(LEAST_POLL_MS, step_s * 1000)))


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
