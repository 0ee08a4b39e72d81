"""The first process of a container: what it clears away, and when it ends."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.triton_repo.serving import HANGS_S, LONG, SMALL
from triton_repo.client import WanClient
from triton_repo.client_errors import JobError
from triton_repo.installation import backend_folder, stub_environment
from triton_repo.probe import DRAIN_FLAG
from triton_repo.repository import write_repository
from triton_repo.server import ServeOptions, arguments, free_ports, is_ready, known_options
from triton_repo.settings import Limits

START = [sys.executable, "-m", "triton_repo.start"]


@contextmanager
def container(installation, engines, folder):
    """A server under that process, and a client; nothing is left of them in the end."""
    write_repository(engines, folder / "repository")
    options = ServeOptions("127.0.0.1", *free_ports(3), region_prefix=f"wan22_{os.getpid()}_")
    with backend_folder(installation) as backends:
        server = arguments(folder / "repository", Limits(1, 1), options, known_options(installation))
        command = [*START, options.region_prefix, installation.binary, *server, f"--backend-directory={backends}"]
        with subprocess.Popen(command, env=stub_environment(installation, os.environ)) as process:
            try:
                while not is_ready(f"http://127.0.0.1:{options.http_port}"):
                    assert process.poll() is None
                with WanClient(f"127.0.0.1:{options.grpc_port}") as client:
                    yield process, client
            finally:
                process.kill()
    assert list(Path("/dev/shm").glob(f"{options.region_prefix}*")) == []


def test_sigterm_finishes_the_running_job(installation, tiny_engines, tmp_path):
    with container(installation, tiny_engines, tmp_path) as (process, client):
        job = client.submit({"prompt": "x", **SMALL, "steps": 40})
        next(job.events())
        process.send_signal(signal.SIGTERM)
        assert job.result().event["steps"] == 40
        assert process.wait(HANGS_S) == 0


def test_a_model_that_dies_ends_the_container(installation, tiny_engines, tmp_path):
    with container(installation, tiny_engines, tmp_path) as (process, client):
        (tritonserver,) = psutil.Process(process.pid).children()
        (stub,) = tritonserver.children()
        job = client.submit({"prompt": "x", **LONG})
        next(job.events())
        stub.kill()
        with pytest.raises(JobError):
            job.result()
        assert process.wait(HANGS_S) == 1
        assert not tritonserver.is_running()


def test_a_started_container_clears_what_the_one_before_left(tmp_path):
    prefix = f"wan22_test_{os.getpid()}_"
    left = Path("/dev/shm", f"{prefix}1")
    left.touch()
    existed = DRAIN_FLAG.exists()
    DRAIN_FLAG.touch()
    done = subprocess.run([*START, prefix, "echo", "the server"], capture_output=True, text=True, check=True)
    assert (done.stdout, left.exists(), DRAIN_FLAG.exists()) == ("the server\n", False, False)
    if existed:
        DRAIN_FLAG.touch()


def test_the_exit_code_is_that_of_the_server():
    for code, told in (("exit 7", 7), ("kill -SEGV $$", 128 + signal.SIGSEGV)):
        done = subprocess.run([*START, f"wan22_test_{os.getpid()}_", "sh", "-c", code], check=False)
        assert done.returncode == told
