"""What happens when things break or end: a killed model, a stopped server, engines that were not packed."""

import os
import subprocess
import time

import psutil
import pytest

from tests.triton_repo.serving import HANGS_S, SMALL, Served, serving
from triton_repo import probe
from triton_repo.client import JobError
from triton_repo.installation import Installation
from triton_repo.repository import write_repository
from triton_repo.server import ServeOptions, free_ports, run_server
from triton_repo.settings import Limits
from wan22.bundle import MANIFEST
from wan22.errors import UserError

LONG_STEPS = {"width": 256, "height": 160, "num_frames": 17, "steps": 50}


def test_a_killed_model_is_noticed_and_the_server_taken_down(installation, tiny_engines, tmp_path):
    with serving(installation, tmp_path, {"wan22": tiny_engines}) as server:
        (stub,) = server.stubs()
        with server.client() as client:
            told = []

            def kill(event):
                """In the middle of a step: a model that dies while it sends takes the whole server with it at once."""
                told.append(time.monotonic())
                if event["phase"] == "denoise" and event["step"] == 2:
                    time.sleep((told[-1] - told[-2]) / 2)
                    stub.kill()

            with pytest.raises(JobError) as error:  # the client is told, it does not hang
                client.generate("x", on_progress=kill, **LONG_STEPS)
            assert error.value.status == "INTERNAL"
            with pytest.raises(JobError) as error:
                client.generate("x", **SMALL)
            assert error.value.status == "INTERNAL"
        assert server.is_ready()  # Triton has not noticed: this is why there is a heartbeat
        with pytest.raises(UserError, match=r"the process of model wan22 died while job .* ran; server stopped"):
            server.server.watch()
        metrics = f"http://127.0.0.1:{server.options.metrics_port}/metrics"
        assert not probe.drain(metrics, tmp_path / "drain", within_s=3600)  # nothing to wait for any more
        regions = server.regions()
    assert regions
    assert server.regions() == []


def test_a_started_server_serves_again_where_a_killed_one_left_its_memory(installation, tiny_engines, tmp_path):
    with serving(installation, tmp_path, {"wan22": tiny_engines}) as server:
        for process in (*server.stubs(), server.process):
            process.kill()
        server.process.wait()
        assert server.regions()
        options = ServeOptions("127.0.0.1", *free_ports(3))
        with run_server(installation, tmp_path / "repository", Limits(1, 1), options, os.environ) as again:
            again.wait_until_ready(within_s=HANGS_S)
            with Served(again).client() as client:
                assert client.generate("x", **SMALL).video
    assert server.regions() == []


def test_sigterm_lets_the_running_job_finish(installation, tiny_engines, tmp_path):
    with serving(installation, tmp_path, {"wan22": tiny_engines}) as server, server.client() as client:
        told = []

        def terminate(event):
            told.append(event["phase"])
            if event["step"] == 2 and event["phase"] == "denoise":
                server.process.terminate()

        result = client.generate("x", on_progress=terminate, **{**SMALL, "steps": 40})
        assert result.event["phase"] == "done"
        assert told.count("denoise") == 40
        assert server.process.wait(HANGS_S) == 0


def test_sigterm_in_topology_bls_ends_the_running_job_and_says_why(installation, tiny_engines, tmp_path):
    with serving(installation, tmp_path, {"wan22": tiny_engines}, "bls") as server, server.client() as client:

        def terminate(event):
            if event["step"] == 2 and event["phase"] == "denoise":
                server.process.terminate()

        with pytest.raises(JobError, match="the server is stopping") as error:
            client.generate("x", on_progress=terminate, **LONG_STEPS)
        assert error.value.status == "UNAVAILABLE"
        assert server.process.wait(HANGS_S) == 0


def refusal(capfd, installation, repository):
    """What the log says when the server of a repository does not come up."""
    options = ServeOptions("127.0.0.1", *free_ports(3))
    with run_server(installation, repository, Limits(1, 1), options, os.environ) as server:
        with pytest.raises(UserError, match="before it was ready") as error:
            server.wait_until_ready(within_s=HANGS_S)
        server.stop()
    return capfd.readouterr().err, str(error.value)


@pytest.fixture
def copy(tiny_engines, tmp_path):
    """Engines that may be damaged."""
    subprocess.run(["cp", "-r", tiny_engines, tmp_path / "engines"], check=True)
    return tmp_path / "engines"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).write_text("{}"), "bundle.json: sha256"),
        (lambda folder: (folder / "low_noise.onnx").write_bytes(b"other code"), "low_noise.onnx: 10 bytes"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no bundle.json"),
    ],
    ids=["another manifest", "another graph", "no engines"],
)
def test_engines_that_are_not_those_that_were_packed_do_not_load(copy, installation, tmp_path, capfd, damage, reason):
    write_repository(copy, tmp_path / "repository")
    damage(copy)
    log, line = refusal(capfd, installation, tmp_path / "repository")
    assert reason in log
    assert reason in line


@pytest.mark.parametrize(
    ("address", "told"),
    [("", "an empty address"), ("127.0.0.1", "program: Permission denied")],
    ids=["address", "server"],
)
def test_a_server_that_would_listen_everywhere_or_is_none_is_not_started(tmp_path, address, told):
    (tmp_path / "program").touch()
    options = ServeOptions(address, *free_ports(3))
    started = run_server(Installation(tmp_path / "program"), tmp_path, Limits(1, 1), options, os.environ)
    with pytest.raises(UserError, match=told), started:
        pass


def test_a_taken_port_is_told(installation, tiny_engines, tmp_path):
    with serving(installation, tmp_path, {"wan22": tiny_engines}) as server:
        processes = psutil.Process().children(recursive=True)
        started = run_server(installation, tmp_path, Limits(1, 1), server.options, os.environ)
        with pytest.raises(UserError, match="expected a free port"), started:
            pass
        assert psutil.Process().children(recursive=True) == processes
