"""Runs work in a child process, which ends with the block that started it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


@contextmanager
def child_process(work: Callable[..., None], *arguments: object) -> Iterator[tuple[Connection, BaseProcess]]:
    """Run ``work(sender, *arguments)`` in a new Python process; yields the other end of its pipe and the process.

    The child ignores Ctrl-C, which the parent handles for both. It is killed when the block ends.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe()
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
    """Block SIGINT: processes started inside inherit the block; this process handles the signal afterwards."""
    resource_tracker.ensure_running()  # otherwise the first process starts it, which unblocks the signal (CPython 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
