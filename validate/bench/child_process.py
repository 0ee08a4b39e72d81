"""Runs work in a child process, which ends with the block that started it, or with the process of that block."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path


@contextmanager
def child_process(
    work: Callable[..., None], *arguments: object, folder: Path | None = None
) -> Iterator[tuple[Connection, BaseProcess]]:
    """Run ``work(sender, *arguments)`` in a new Python process; yields the other end of its pipe and the process.

    The child ignores Ctrl-C, which the parent handles for both. It is killed when the block ends. If this process is
    killed, the child removes ``folder``, which this process would have removed.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_run, args=(work, folder, sender, *arguments), daemon=True)
    try:
        with _interrupts_held():
            process.start()
        sender.close()
        yield receiver, process
    finally:
        if process.pid is not None:
            process.kill()
            process.join()


def _run(work: Callable[..., None], folder: Path | None, sender: Connection, *arguments: object) -> None:
    """In the child: ``work``, while its parent lives."""

    def end_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        connection.wait([parent.sentinel])
        while folder is not None and folder.exists():  # the other thread may still write there
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    work(sender, *arguments)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT: processes started inside inherit the block; this process handles the signal afterwards."""
    resource_tracker.ensure_running()  # otherwise the first process starts it, which unblocks the signal (CPython 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
