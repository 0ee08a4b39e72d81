"""A child process ignores Ctrl-C and does not outlive the block that started it."""

import os
import signal
import threading

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
