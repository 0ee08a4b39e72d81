"""The process group of a ``tritonserver``, which cannot outlive this process and stops as soon as its work is done.

The server and the processes of its models are one group. All of it ends when the server ends, when a model dies, and,
by the kernel's parent-death signal, when this process is killed. Standard library only.
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
IDLE_S = 3.0  # time for an idle server to end before it is killed
POLL_S = 0.1


def start_group(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    lock: int,
    output: IO[bytes] | int | None = None,
) -> "subprocess.Popen[bytes]":
    """Start ``command`` as a group. Its models report to ``folder`` and hold ``lock`` while one of them lives.

    Only this user can open its files and shared memory. The calling thread must live as long as the server, because
    Linux sends the parent-death signal when that thread ends.

    The larger stack keeps Triton's HTTP server alive: it copies a form-encoded body twice onto a thread's stack, and a
    body above half of the usual 8 MiB would crash it.
    """
    status = folder / "status"
    status.mkdir()
    c, parent = ctypes.CDLL(None), os.getpid()
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if most == resource.RLIM_INFINITY else min(STACK_BYTES, most)

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (stack, most))
        c.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return subprocess.Popen(
        command,
        env={**environment, FOLDER: str(status)},
        stdout=output,
        stderr=output and subprocess.STDOUT,
        start_new_session=True,  # on Ctrl-C it gets one SIGTERM from us
        cwd=folder,  # loads no library or module from the caller's folder
        umask=0o077,
        pass_fds=(lock,),
        preexec_fn=prepare,  # noqa: PLW1509 - no lock is taken in it
    )


def models_of(folder: Path) -> Models:
    return Models(folder / "status")


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGKILL to the server and the processes of its models."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop_group(process: "subprocess.Popen[bytes]", models: Models, within_s: float) -> None:
    """Send SIGTERM, which lets running and waiting jobs finish, then SIGKILL when waiting is pointless.

    Waiting ends when the server has ended, a model is dead, no job runs and no video is being sent, or after
    ``within_s``. Triton alone would wait for a dead model and for every idle connection.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C; the group is killed.
    """
    give_up, idle_s = time.monotonic() + within_s, 0.0
    try:
        if process.poll() is None:
            process.terminate()
        while process.poll() is None and time.monotonic() < give_up and not models.dead() and idle_s <= IDLE_S:
            time.sleep(POLL_S)
            idle_s = 0.0 if models.jobs() or _unsent_bytes(process.pid) else idle_s + POLL_S
    finally:
        end_group(process)


def _unsent_bytes(process: int) -> int:
    """The bytes in the send queues of a process's TCP connections."""
    with suppress(OSError):  # it has ended
        sockets = {str(file.readlink()) for file in Path(f"/proc/{process}/fd").iterdir()}
        tables = (Path(f"/proc/{process}/net/{name}").read_text() for name in ("tcp", "tcp6"))
        rows = (line.split() for table in tables for line in table.splitlines()[1:])
        return sum(int(row[4].partition(":")[0], 16) for row in rows if f"socket:[{row[9]}]" in sockets)
    return 0
