"""A job's events → one rising percentage, a phase and the time left.

The shares of the phases are planned: the denoising steps take nearly all of a job's time. 100 is not reached here but
when the video can be fetched.
"""

from dataclasses import dataclass
from typing import Any

BEFORE = 3  # percent of text and image encoders
DENOISED = 88
DECODED = 98
MOST = 99


@dataclass
class Progress:
    """Follows one run of a job; ``least`` is where an earlier run of it was.

    Args:
        least: percent, from which this never falls.
        has_image: the job starts from an image.
    """

    least: int = 0
    has_image: bool = False

    def values(self, event: dict[str, Any]) -> dict[str, Any]:
        """The columns that ``event`` of the served model changes."""
        phase, step, total = event["phase"], event.get("step", 0), event.get("total", 0)
        share = step / total if total else 0.0
        eta_s = event.get("eta_s")
        if phase == "start":
            return self._at(1, {"phase": "image" if self.has_image else "text", "step": 0, "steps": event["steps"]})
        if phase == "denoise":
            percent = BEFORE + share * (DENOISED - BEFORE)
            after = None if eta_s is None else eta_s / 0.9 if step < total else None  # the decoder comes yet
            told = {"step": step, "steps": total, "expert": event.get("expert"), "eta_s": after}
            return self._at(percent, {"phase": "denoise" if step < total else "decode", **told})
        if phase == "decode":
            percent = DENOISED + share * (DECODED - DENOISED)
            return self._at(percent, {"phase": "decode" if step < total else "encode", "eta_s": eta_s})
        return self._at(MOST, {"phase": "encode", "eta_s": 0.0})

    def _at(self, percent: float, values: dict[str, Any]) -> dict[str, Any]:
        self.least = max(self.least, min(MOST, int(percent)))
        return {**values, "progress": self.least}
