"""A child process ignores Ctrl-C and does not outlive the block that started it."""

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from validate.bench.child_process import child_process


def answer_twice(sender, word):
    sender.send(word)
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches every process of a terminal
    sender.send(word)
    threading.Event().wait()


def test_ctrl_c_does_not_end_the_child_but_the_end_of_the_block_does():
    with child_process(answer_twice, "here") as (receiver, process):
        assert [receiver.recv(), receiver.recv()] == ["here", "here"]
        assert process.is_alive()
    assert process.exitcode == -signal.SIGKILL


def test_a_block_that_fails_ends_it_too():
    with pytest.raises(ValueError, match="mine"), child_process(answer_twice, "here") as (receiver, process):
        receiver.recv()
        raise ValueError("mine")
    assert process.exitcode == -signal.SIGKILL


def test_this_process_handles_ctrl_c_again():
    with child_process(answer_twice, "here"):
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


OUTLIVED = """
from tests.validate.bench.test_child_process import answer_twice
from validate.bench.child_process import child_process
if __name__ == "__main__":
    with child_process(answer_twice, "here") as (receiver, process):
        receiver.recv()
        print(process.pid, flush=True)
        process.join()
"""


def test_a_child_ends_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "outlived.py").write_text(OUTLIVED)
    command = [sys.executable, str(tmp_path / "outlived.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    assert select.select([child], [], [], 60)[0]  # it has ended
    os.close(child)
