"""Work in a process of its own, which ends with the block that started it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


@contextmanager
def child_process(work: Callable[..., None], *arguments: object) -> Iterator[tuple[Connection, BaseProcess]]:
    """Runs ``work(sender, *arguments)`` in a new Python process; yields the other end of ``sender``, and the process.

    The process does not hear Ctrl-C, which this one answers for both. It is killed when the block ends.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, *arguments), daemon=True)
    try:
        with _interrupts_held():
            process.start()
        sender.close()
        yield receiver, process
    finally:
        if process.pid is not None:
            process.kill()
            process.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside inherit the blocked signal; here it is answered when the block ends."""
    resource_tracker.ensure_running()  # the first process would start it, which unblocks the signal (CPython 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
