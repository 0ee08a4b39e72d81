"""Probes of a pod for an orchestrator: is the model alive, and has it finished its work? Standard library only.

``python3 -m triton_repo.probe alive`` is a liveness probe; Triton's own still succeeds after the model's process died.
``python3 -m triton_repo.probe drain`` is a preStop hook: it raises the drain flag and waits for the last job.
"""

import argparse
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

METRICS = "http://127.0.0.1:8002/metrics"
DRAIN_FLAG = Path("/tmp/wan22-drain")
SERIES = re.compile(r"(?m)^(\w+)(?:\{[^}]*\})? (\S+)$")
HEARTBEAT = "wan22_heartbeat_monotonic_seconds"
LAST_STEP = "wan22_last_step_monotonic_seconds"
FAILURES = "wan22_failures_in_a_row"
IN_FLIGHT, PENDING = "wan22_in_flight", "nv_inference_pending_request_count"
MAX_SILENCE_S = 120.0  # reading an expert from disk may delay heartbeats
MAX_STEP_S = 1800.0
MAX_FAILURES = 10  # consecutive failed jobs mean that the device or the engines are broken, not the requests
SECOND_LOOK_S = 7.0  # slightly more than one heartbeat


def read(url: str = METRICS) -> dict[str, list[float]]:
    """The values of each series, by its name, over all models.

    Raises:
        OSError: nothing answers at ``url``, or the answer is not metrics.
    """
    found: dict[str, list[float]] = {}
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for name, value in SERIES.findall(text):
            found.setdefault(name, []).append(float(value))
    except (ValueError, HTTPException) as error:
        raise OSError(f"no metrics: {error}") from error
    return found


def troubles(
    metrics: dict[str, list[float]], max_silence_s: float = MAX_SILENCE_S, max_step_s: float = MAX_STEP_S
) -> Iterator[str]:
    """Yield the problems of a server's models; nothing if all is well."""
    now = time.monotonic()
    if not metrics.get(HEARTBEAT):
        yield "no heartbeat of any model"
    for beat in metrics.get(HEARTBEAT, []):
        if now - beat > max_silence_s:
            yield f"model heartbeat missing for {now - beat:.0f} s"
    for busy, step in zip(metrics.get(IN_FLIGHT, []), metrics.get(LAST_STEP, []), strict=False):
        if busy and now - step > max_step_s:
            yield f"no progress of the running job for {now - step:.0f} s"
    for failed in metrics.get(FAILURES, []):
        if failed >= MAX_FAILURES:
            yield f"the last {failed:.0f} jobs failed"


def confirmed_troubles(
    url: str, max_silence_s: float = MAX_SILENCE_S, max_step_s: float = MAX_STEP_S, again_s: float = SECOND_LOOK_S
) -> list[str]:
    """The :func:`troubles` that a second look confirms, in case a clock was set between two heartbeats.

    Raises:
        OSError: see :func:`read`.
    """
    found = list(troubles(read(url), max_silence_s, max_step_s))
    if not found:
        return []
    time.sleep(again_s)
    return list(troubles(read(url), max_silence_s, max_step_s))


def work(metrics: dict[str, list[float]]) -> int:
    """The number of running and waiting jobs."""
    return int(sum(metrics.get(IN_FLIGHT, []) + metrics.get(PENDING, [])))


def drain(url: str, flag: Path, within_s: float, every_s: float = 1.0) -> bool:
    """Create ``flag``, which makes the model unready, and wait for the last job.

    Returns False if waiting is pointless: time is up, the server is gone, or a model is dead.
    """
    flag.touch()
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        try:
            metrics = read(url)
        except OSError:
            return False
        if not work(metrics):
            return True
        if list(troubles(metrics)):
            return False
        time.sleep(every_s)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=("alive", "drain"))
    parser.add_argument("--metrics", default=METRICS)
    parser.add_argument("--max-silence-s", type=float, default=MAX_SILENCE_S)
    parser.add_argument("--max-step-s", type=float, default=MAX_STEP_S)
    parser.add_argument("--flag", type=Path, default=DRAIN_FLAG)
    parser.add_argument("--within-s", type=float, default=3600)
    asked = parser.parse_args()
    if asked.question == "drain":
        return 0 if drain(asked.metrics, asked.flag, asked.within_s) else 1
    try:
        found = confirmed_troubles(asked.metrics, asked.max_silence_s, asked.max_step_s)
    except OSError as error:
        found = [f"no answer from {asked.metrics}: {error}"]
    print("\n".join(found) or "alive", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
