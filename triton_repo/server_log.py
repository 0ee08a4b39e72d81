"""The output of a quiet ``tritonserver``: held back until it is ready, then passed on."""

import signal
import sys
import threading
from collections import deque
from typing import IO

HELD_LINES = 200
MAX_REASON = 300  # characters
STOPPED = f"Signal ({int(signal.SIGTERM)})"  # caused by our own SIGTERM


class ServerLog:
    """Reads ``output`` to its end in a thread, so that the server never blocks; None means not captured."""

    def __init__(self, output: IO[bytes] | None) -> None:
        self._held: deque[str] = deque(maxlen=HELD_LINES)
        self._shown = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(output,), name="server-log", daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Print new lines from now on, but not those held back."""
        self._shown.set()

    def first_error(self) -> str:
        """The server's first error line, or else its last line; call this after it has ended."""
        self._thread.join(5)  # a child of the server may still have the pipe open
        errors = (line for line in self._held if line.startswith("E"))
        reason = next(errors, self._held[-1] if self._held else "")
        return reason.partition("] ")[2][:MAX_REASON] or reason[:MAX_REASON]

    def _read(self, output: IO[bytes] | None) -> None:
        for raw in output or ():
            line = raw.decode(errors="replace").rstrip()
            if line.startswith(STOPPED):
                continue
            if self._shown.is_set():
                print(line, file=sys.stderr, flush=True)
            else:
                self._held.append(line)
