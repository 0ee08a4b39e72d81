"""Two jobs in work at a time on devices with an expert each: the next one begins when the one before has passed on.

A call returns when its job has left the first expert, so that the server's queue keeps its limit: beside the waiting
jobs there are at most one with the first expert and one with the last.
"""

import threading
from collections.abc import Callable

PAUSE_EVERY_S = 0.2


class Relay:
    """Runs jobs in threads of their own."""

    def __init__(self) -> None:
        self._last = threading.Lock()  # held by the job with the last expert
        self._own = threading.local()
        self._running: set[threading.Thread] = set()

    def run(self, job: Callable[[], None]) -> None:
        """Begin ``job``; return when it has called :meth:`pass_on`, or has ended."""
        passed = threading.Event()
        thread = threading.Thread(target=self._job, args=(job, passed), name="job")
        self._running = {other for other in self._running if other.is_alive()} | {thread}
        thread.start()
        passed.wait()

    def pass_on(self, pause: Callable[[], None]) -> None:
        """Called by a job before its last expert: wait until no other job has that one. Once for each job.

        ``pause`` is called now and then meanwhile, and may raise to end the job.
        """
        if getattr(self._own, "passed", None) is None or self._own.has_last:
            return
        while not self._last.acquire(timeout=PAUSE_EVERY_S):
            pause()
        self._own.has_last = True
        self._own.passed.set()

    def wait(self) -> None:
        """Wait until all jobs have ended."""
        for thread in self._running:
            thread.join()

    def _job(self, job: Callable[[], None], passed: threading.Event) -> None:
        self._own.passed, self._own.has_last = passed, False
        try:
            job()
        finally:
            if self._own.has_last:
                self._last.release()
            passed.set()
