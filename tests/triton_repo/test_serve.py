"""``wan-trt serve`` as whoever starts it sees it: what it prints, how it ends, what it leaves behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.triton_repo.serving import HANGS_S, LONG, SMALL
from triton_repo import probe
from triton_repo.client import WanClient
from triton_repo.client_errors import JobError
from triton_repo.installation import default_environments, find_installation
from triton_repo.server import free_ports, is_ready
from triton_repo.server_folder import remove_dead_servers
from wan22.errors import UserError

ENDLESS = {**LONG, "steps": 100, "preview": True}
SHARED_MEMORY = Path("/dev/shm")
ROOT = Path(__file__).parents[2]


class Serve:
    """The command in a process of its own, with its lines as they come."""

    def __init__(self, engines, folder, *options):
        self.http, self.grpc, self.metrics = free_ports(3)
        ports = [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}"]
        words = ["wan-trt", "serve", str(engines), *ports, *options]
        start = f"sys.path[0] = {str(ROOT)!r}; sys.argv = {words!r}; from wan_trt.cli import main; main()"
        code = f"import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); {start}"  # under nohup it is ignored
        self.command = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        self.lines, self.changed = [], threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.command.stdout:
            with self.changed:
                self.lines.append(line.rstrip())
                self.changed.notify_all()

    def wait_for(self, words):
        with self.changed:
            assert self.changed.wait_for(lambda: any(words in line for line in self.lines), HANGS_S), self.lines
        return self

    def processes(self):
        """tritonserver, its stub, and what watches over that."""
        return psutil.Process(self.command.pid).children(recursive=True)

    def regions(self):
        """``regions()`` afterwards → what there is in shared memory of the server that runs now."""
        words = self.processes()[0].cmdline()
        (prefix,) = (word.rpartition("=")[2] for word in words if "shm-region-prefix-name" in word)
        return lambda: sorted(SHARED_MEMORY.glob(f"{prefix}*"))

    def client(self):
        return WanClient(f"127.0.0.1:{self.grpc}")

    def exit_code(self):
        code = self.command.wait(HANGS_S)
        self._reader.join(HANGS_S)
        return code


@pytest.fixture
def serve(installation, tiny_engines, tmp_path):
    """``serve()`` → one that is ready; nothing of it is left in the end."""
    started = []

    def start(*options, engines=tiny_engines):
        started.append(Serve(engines, tmp_path, *options))
        return started[-1]

    yield start
    for each in started:
        if each.command.poll() is None:
            processes = each.processes()
            each.command.kill()
            assert gone(processes)
    remove_dead_servers()


def gone(processes):
    """Waits for the end of ``processes``."""
    _, alive = psutil.wait_procs(processes, 30)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_says_one_line_when_it_is_ready_and_ends_at_a_signal(serve, sent):
    server = serve().wait_for("is ready")
    regions = server.regions()
    assert regions()
    with server.client() as client:
        assert client.generate("x", **SMALL).video
    metrics = probe.read(f"http://127.0.0.1:{server.metrics}/metrics")
    assert (list(probe.troubles(metrics)), probe.work(metrics)) == ([], 0)
    server.command.send_signal(sent)
    assert server.exit_code() == 0
    assert regions() == []
    assert len(server.lines) == 2, server.lines
    ready, stopping = server.lines
    assert ready == f"wan22 is ready: wan-trt client 127.0.0.1:{server.grpc} PROMPT -o out.mp4"
    assert stopping.startswith("stopping: ")


def test_the_log_is_shown_when_it_is_asked_for(serve):
    server = serve("--verbose").wait_for("is ready")
    assert any("Started GRPCInferenceService" in line for line in server.lines)


def test_a_server_that_does_not_start_says_why_in_one_line(serve, with_nan, tiny_engines):
    server = serve(engines=with_nan(tiny_engines, "low_noise"))
    assert server.exit_code() == 2
    (line,) = server.lines
    assert line.startswith("wan-trt: velocity of low_noise in step 2 of 2")
    assert line.count(" | ") == 2


def test_the_running_job_is_finished_and_an_idle_connection_is_not_waited_for(serve):
    server = serve().wait_for("is ready")
    with server.client() as client, server.client() as idle:
        refused = idle.submit({"prompt": ""})  # its stream stays open, because nobody reads it
        job = client.submit({"prompt": "x", **LONG, "steps": 10})
        next(job.events())
        server.command.terminate()
        assert job.result().event["phase"] == "done"
        assert server.exit_code() == 0
        with pytest.raises(JobError):
            refused.result()


def test_idle_connections_alone_do_not_hold_a_server(serve):
    server = serve().wait_for("is ready")
    with server.client() as client:
        job = client.submit({"prompt": ""})  # refused, and the stream stays open
        time.sleep(1)
        processes = server.processes()
        server.command.terminate()
        started = time.monotonic()
        assert server.exit_code() == 0
        print(f"ended after {time.monotonic() - started:.1f} s")
        assert gone(processes)
        job.cancel()


def test_a_second_ctrl_c_ends_everything_at_once(serve):
    server = serve().wait_for("is ready")
    processes, regions = server.processes(), server.regions()
    with server.client() as client:
        next(client.submit({"prompt": "x", **ENDLESS}).events())
        waiting = client.submit({"prompt": "x", **ENDLESS})  # noqa: F841 a job that waits
        server.command.send_signal(signal.SIGINT)
        server.wait_for("Ctrl-C again")
        server.command.send_signal(signal.SIGINT)
        assert server.exit_code() == 130
    assert gone(processes)
    assert regions() == []
    assert server.lines[-1].startswith("wan-trt: interrupted")


@pytest.mark.parametrize("busy", [False, True])
def test_a_command_that_is_killed_takes_its_processes_along_and_the_next_one_its_memory(serve, busy):
    server = serve().wait_for("is ready")
    processes, regions = server.processes(), server.regions()
    with server.client() as client:
        if busy:
            next(client.submit({"prompt": "x", **ENDLESS}).events())
        server.command.kill()
        assert gone(processes)
    remove_dead_servers()  # what the next one does first
    assert regions() == []


def test_a_crash_of_the_server_ends_it_with_a_line_that_names_the_job(serve):
    server = serve().wait_for("is ready")
    tritonserver, *others = server.processes()
    with server.client() as client:
        job = client.submit({"prompt": "x", **ENDLESS})
        next(job.events())
        tritonserver.send_signal(signal.SIGSEGV)
        assert server.exit_code() == 2
        with pytest.raises(JobError) as error:
            job.result()
        assert error.value.status == "UNAVAILABLE"
    assert gone(others)
    (line,) = (line for line in server.lines if line.startswith("wan-trt:"))
    assert f"tritonserver was ended by SIGSEGV while job {job.id} ran" in line


def test_a_dead_model_is_noticed_within_ten_seconds_and_served_again_within_twenty(serve):
    server = serve().wait_for("is ready")
    tritonserver, stub, _ = server.processes()
    with server.client() as client:
        next(client.submit({"prompt": "x", **ENDLESS}).events())
        stub.kill()
        killed = time.monotonic()
        assert server.exit_code() == 2
        noticed_s = time.monotonic() - killed
        again = serve().wait_for("is ready")
        served_s = time.monotonic() - killed
    print(f"noticed after {noticed_s:.1f} s, ready again after {served_s:.1f} s")
    assert gone([tritonserver])
    # Triton 2.51 aborts when a model is killed in the moment it sends, because the model then holds a shared lock.
    assert re.search(r"(model wan22 died|ended by SIGABRT) while job \w+ ran", server.lines[-1])
    with again.client() as client:
        assert client.generate("x", **SMALL).video


def test_nothing_is_run_from_the_working_folder(serve, tmp_path, monkeypatch):
    """Neither a tritonserver, nor an environment with one, nor Python modules of the names that a model imports."""
    trap = f"#!/bin/sh\ntouch {tmp_path}/trapped\n"
    planted = tmp_path / ".venv-triton" / "lib" / "python3.11" / "site-packages" / "pytriton" / "tritonserver"
    for path in (tmp_path / "tritonserver", tmp_path / "python3", planted / "bin" / "tritonserver"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trap)
        path.chmod(0o755)
    for module in ("numpy", "runtime", "triton_repo", "sitecustomize"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\n")
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert tmp_path not in find_installation(default_environments()).binary.parents
    server = serve().wait_for("is ready")
    with server.client() as client:
        assert client.generate("x", **SMALL).video
    assert not (tmp_path / "trapped").exists()


def test_shared_memory_is_for_its_user_alone(serve):
    regions = serve().wait_for("is ready").regions()()
    assert len(regions) >= 2
    assert {path.stat().st_mode & 0o077 for path in regions} == {0}


def test_a_taken_port_is_told(serve):
    server = serve().wait_for("is ready")
    second = serve(f"--http-port={server.http}")
    assert second.exit_code() == 2
    assert second.lines == [
        f"wan-trt: 127.0.0.1:{server.http}: Address already in use | expected a free port | choose another"
    ]
    assert is_ready(f"http://127.0.0.1:{server.http}")


def test_an_environment_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tritonserver"):
        find_installation((tmp_path,), None)
