"""What a probe says where something else than Triton answers."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.triton_repo.serving import HANGS_S
from triton_repo import probe


@pytest.fixture
def answering():
    """``answering(data, ...)`` → the address of a server that answers so, each once."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(*answers):
            def each():
                for data in answers:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(data)

            threading.Thread(target=each, daemon=True).start()
            return "http://{}:{}/metrics".format(*server.getsockname())

        yield answer


@pytest.mark.parametrize(
    "data", [b"", b"PRI * HTTP/2.0", b"HTTP/1.0 200 OK\r\n\r\n\xff", b"HTTP/1.0 200 OK\r\n\r\na fox\n"]
)
def test_what_is_no_metrics_is_told_in_one_line(answering, tmp_path, data):
    asked = [sys.executable, "-m", "triton_repo.probe", "--metrics", answering(data), "--flag", str(tmp_path / "flag")]
    done = subprocess.run([*asked, "alive"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("no answer from http://127.0.0.1")


def test_an_address_that_is_none_ends_a_drain_at_once(tmp_path):
    asked = [sys.executable, "-m", "triton_repo.probe", "--metrics", "nowhere", "--flag", str(tmp_path / "flag")]
    done = subprocess.run([*asked, "drain"], capture_output=True, text=True, check=False, timeout=HANGS_S)
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "flag").exists()


def beats(*ages_s, failures=0):
    """Answers with heartbeats of these ages."""
    now = time.monotonic()
    lines = (f"wan22_heartbeat_monotonic_seconds {now - age}\nwan22_failures_in_a_row {failures}\n" for age in ages_s)
    return [b"HTTP/1.0 200 OK\r\n\r\n" + line.encode() for line in lines]


@pytest.mark.parametrize(("ages", "silent"), [((1,), False), ((600, 1), False), ((600, 600), True)])
def test_a_heartbeat_is_missing_when_it_is_at_a_second_look(answering, ages, silent):
    found = probe.confirmed_troubles(answering(*beats(*ages)), again_s=0.01)
    assert [trouble.startswith("model heartbeat missing for 60") for trouble in found] == [True] * silent


@pytest.mark.parametrize(("failures", "broken"), [(probe.MAX_FAILURES - 1, False), (probe.MAX_FAILURES, True)])
def test_many_failures_in_a_row_are_a_trouble(answering, failures, broken):
    found = probe.confirmed_troubles(answering(*beats(1, 1, failures=failures)), again_s=0.01)
    assert found == [f"the last {failures} jobs failed"] * broken
