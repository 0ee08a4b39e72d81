"""A real server whose model has an expert on each of two devices, and guidance on two for each of them."""

import subprocess
import sys
import threading

import pytest

from runtime.block_backend import BlockOptions
from tests.triton_repo.serving import HANGS_S, serving
from tests.triton_repo.test_queue import Background
from triton_repo.job import CancelledError
from triton_repo.probe import MAX_FAILURES, read, troubles
from triton_repo.relay import Relay
from wan_trt.cli import app

JOB = {"width": 128, "height": 96, "num_frames": 9, "steps": 24, "seed": 3}


@pytest.fixture(scope="module")
def server(installation, tiny_engines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    options = {"blocks": BlockOptions(parallel="experts,cfg2")}
    with serving(installation, folder, {"wan22": tiny_engines}, options={"wan22": options}) as served:
        yield served


SCRIPT = """
import hashlib, sys
from pathlib import Path
from runtime.pipeline import Pipeline
from runtime.request import Request
with Pipeline.open(Path(sys.argv[1])) as pipeline:
    request = Request("x", size=(128, 96), frames=9, steps=24, seed=3)
    *_, last = pipeline.denoise(pipeline.complete(request))
print(hashlib.sha256(last.latents.tobytes()).hexdigest())
"""


@pytest.fixture
def of_one_device(installation, tiny_engines):
    """The hash of the latents by one device, in the Python of the server's models."""
    python = sys.executable if installation.environment is None else installation.environment / "bin" / "python3"
    words = [str(python), "-c", SCRIPT, str(tiny_engines)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_two_jobs_are_in_work_and_each_has_its_own_events_and_its_own_end(server, of_one_device):
    first = Background(server, **JOB)
    assert first.started.wait(HANGS_S)
    second = Background(server, **JOB)
    assert second.started.wait(HANGS_S)
    third = Background(server, **JOB)
    second.job.cancel()
    assert second.join().error.status == "CANCELLED"
    for job in (first.join(), third.join()):
        steps = [event["step"] for event in job.events if event["phase"] == "denoise"]
        assert steps == list(range(1, 25))
        assert job.result.event["latents_sha256"] == of_one_device
    starts = [job.events[0]["started_unix_ms"] for job in (first, second)]
    assert starts[0] < starts[1] < starts[0] + 1000 * first.result.event["seconds"]
    server.wait_for("wan22_in_flight", 0)
    assert server.metric("wan22_requests_total", outcome="done") == 2


def test_a_job_that_waits_for_the_last_expert_can_be_given_up():
    relay, over, ended = Relay(), threading.Event(), []

    def first():
        relay.pass_on(lambda: None)
        assert over.wait(HANGS_S)

    def gives_up():
        raise CancelledError

    def second():
        try:
            relay.pass_on(gives_up)
        except CancelledError:
            ended.append("second")

    relay.run(first)
    relay.run(second)
    assert ended == ["second"]
    over.set()
    relay.wait()
    relay.run(first)
    relay.wait()


BREAKS = """

class TritonPythonModel(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)

        def gone(**_):
            raise RuntimeError("CUDA error: the device is gone")

        expert = self.pipeline.engine("low_noise")._engine
        expert._engines[list(expert._engines)[1]] = gone
"""


def test_a_server_that_lost_a_device_asks_to_be_replaced(installation, tiny_engines, tmp_path):
    options = {"wan22": {"blocks": BlockOptions(parallel="cfg2")}}
    with serving(installation, tmp_path, {"wan22": tiny_engines}, options=options, added=BREAKS) as server:
        first = Background(server, **JOB).join()
        assert first.error.status == "INTERNAL"
        server.wait_for("wan22_failures_in_a_row", MAX_FAILURES)
        assert Background(server, **JOB).join().error.status == "INTERNAL"
        assert "the last" in next(troubles(read(f"http://127.0.0.1:{server.options.metrics_port}/metrics")))


def test_loras_with_an_expert_each_are_refused_before_one_is_read(tiny_engines, tmp_path, capsys):
    lora = f"ink={tmp_path / 'missing.safetensors'}"
    with pytest.raises(SystemExit) as left:
        app(["serve", str(tiny_engines), "--lora", lora, "--parallel", "experts"])
    assert left.value.code == 2
    assert "--lora with --parallel experts | expected jobs with the same weights" in capsys.readouterr().err
