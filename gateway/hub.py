"""Tell coroutines that wait for a job that something has changed. Jobs of other gateways are looked at now and then."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Hub:
    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def start(self) -> None:
        """Call in the event loop."""
        self._loop = asyncio.get_running_loop()

    def changed(self, job_id: str) -> None:
        """Call from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()

    @contextmanager
    def watch(self, job_id: str) -> Iterator["Watch"]:
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield Watch(event)
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]


class Watch:
    def __init__(self, event: asyncio.Event) -> None:
        self._event = event

    async def change(self, within_s: float) -> bool:
        """Wait for the next change, or that long. True if there was one."""
        try:
            await asyncio.wait_for(self._event.wait(), within_s)
        except TimeoutError:
            return False
        self._event.clear()
        return True
