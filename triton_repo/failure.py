"""The reason why a job ended without a video: a stable code, and a message that any client may see.

The message is that of a :class:`wan22.errors.UserError`, with input names instead of command-line options, and no
commands.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from wan22.errors import UserError

Code = Literal["INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "INTERNAL"]
MAX_WORDS = 180  # characters of each part; a request may contain much more
OPTION = re.compile(r"--([a-z][a-z-]*)")
INPUTS = {"size": "width and height", "frames": "num_frames"}  # by option, if the names differ


@dataclass(frozen=True)
class Failure:
    code: Code
    found: str
    expected: str = ""  # empty if unknown
    remedy: str = ""

    @classmethod
    def of(cls, error: UserError) -> "Failure":
        """The failure for a request that the model or the server refuses."""
        remedy = "request a setting that this server supports" if "wan-trt" in error.remedy else error.remedy
        parts = []
        for words in (error.found, error.expected, remedy):
            named = OPTION.sub(lambda option: INPUTS.get(option[1], option[1].replace("-", "_")), words)
            parts.append(named if len(named) <= MAX_WORDS else named[:MAX_WORDS] + "…")
        return cls("INVALID_ARGUMENT", *parts)

    @property
    def message(self) -> str:
        """One line."""
        return str(UserError(self.found, self.expected, self.remedy)) if self.expected else self.found

    def event(self) -> dict[str, Any]:
        """The last event of the job, for clients that ask for failures as events."""
        parts = {"found": self.found, "expected": self.expected, "remedy": self.remedy}
        return {"phase": "failed", "code": self.code, "message": self.message, **parts}
