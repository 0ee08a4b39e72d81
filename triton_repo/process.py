"""The process group of a ``tritonserver``: started so that it cannot outlive us, stopped as soon as its work is done.

The server and the processes of its models are one group. It ends as a whole: when the server does, when a model dies,
and, by the kernel's parent-death signal, when this process is killed. Standard library only.
"""

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from triton_repo.model_status import FOLDER, Models

PR_SET_PDEATHSIG = 1
STACK_BYTES = 256 * 2**20
IDLE_S = 3.0  # for a server that neither works nor sends to end by itself, before it is killed
POLL_S = 0.1


def start_group(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    lock: int,
    output: IO[bytes] | int | None = None,
) -> "subprocess.Popen[bytes]":
    """Starts ``command`` as a group; its models report to ``folder``, and ``lock`` stays held while one of them lives.

    Files and shared memory that it makes are for this user alone. The thread that calls this must live as long as the
    server may, because Linux takes the end of that thread for the end of the parent.

    The larger stack keeps Triton's HTTP server alive: it copies a form-encoded body twice onto the stack of a thread,
    and dies of one above half of the usual 8 MiB.
    """
    status = folder / "status"
    status.mkdir()
    c, parent = ctypes.CDLL(None), os.getpid()
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if most == resource.RLIM_INFINITY else min(STACK_BYTES, most)

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (stack, most))
        c.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before the line above
            os._exit(1)

    return subprocess.Popen(
        command,
        env={**environment, FOLDER: str(status)},
        stdout=output,
        stderr=output and subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches it as one SIGTERM from us
        cwd=folder,  # no library or module is taken from the folder of the caller
        umask=0o077,
        pass_fds=(lock,),
        preexec_fn=prepare,  # noqa: PLW1509 - no lock is taken in it
    )


def models_of(folder: Path) -> Models:
    return Models(folder / "status")


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL for the server and the processes of its models."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop_group(process: "subprocess.Popen[bytes]", models: Models, within_s: float) -> None:
    """SIGTERM, which lets running and waiting jobs finish; SIGKILL when there is nothing left to wait for.

    That is: the server has ended, a model is dead, no job runs and no video is on its way to a client, or ``within_s``
    is over. Triton alone would wait for a dead model and for every idle connection.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C; the group is killed.
    """
    try:
        if process.poll() is None:
            process.terminate()
        _wait(process, models, within_s)
    finally:
        end_group(process)


def _wait(process: "subprocess.Popen[bytes]", models: Models, within_s: float) -> None:
    give_up, idle_s = time.monotonic() + within_s, 0.0
    while process.poll() is None and time.monotonic() < give_up and not models.dead():
        idle_s = 0.0 if models.jobs() or _unsent_bytes(process.pid) else idle_s + POLL_S
        if idle_s > IDLE_S:
            return
        time.sleep(POLL_S)


def _unsent_bytes(process: int) -> int:
    """What the TCP connections of a process have not brought to the other end yet."""
    with suppress(OSError):  # it has ended
        sockets = {str(file.readlink()) for file in Path(f"/proc/{process}/fd").iterdir()}
        tables = (Path(f"/proc/{process}/net/{name}").read_text() for name in ("tcp", "tcp6"))
        rows = (line.split() for table in tables for line in table.splitlines()[1:])
        return sum(int(row[4].partition(":")[0], 16) for row in rows if f"socket:[{row[9]}]" in sockets)
    return 0
