"""What a probe says where something else than Triton answers."""

import socket
import subprocess
import sys
import threading

import pytest


@pytest.fixture
def answering():
    """``answering(data)`` → the address of a server that answers so, once."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(data):
            def once():
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(data)

            threading.Thread(target=once, daemon=True).start()
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
    done = subprocess.run([*asked, "drain"], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "flag").exists()
