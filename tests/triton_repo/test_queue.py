"""Who is served when, who is refused, and how soon a job that nobody wants is over. All on a real server."""

import http.client
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.triton_repo.serving import HANGS_S, LONG, serving
from triton_repo import probe
from triton_repo.client import JobError

QUEUE = 3  # jobs that may wait, per priority
ENDLESS = {**LONG, "steps": 100, "preview": True}  # to be given up when all is arranged
TINY_JOB = {"width": 64, "height": 64, "num_frames": 1, "steps": 2}
TRIES = 5  # of a measurement that other work on the machine can spoil


@pytest.fixture(scope="module")
def server(installation, tiny_engines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with serving(installation, folder, {"wan22": tiny_engines}, max_queue_size=QUEUE) as served:
        yield served


@pytest.fixture(autouse=True)
def idle(server):
    """Every test finds and leaves the server without work."""
    yield
    server.wait_for("wan22_in_flight", 0)
    server.wait_for("nv_inference_pending_request_count", 0, version="1")


class Background:
    """A job in a thread of its own, with all its events and its end."""

    def __init__(self, server, deadline_s=math.inf, priority=2, **settings):
        self.events, self.started, self.fourth = [], threading.Event(), threading.Event()
        self.result = self.error = None
        self.client = server.client()
        self.job = self.client.submit({"prompt": "x", **settings}, deadline_s=deadline_s, priority=priority)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            for event in self.job.events():
                self.events.append(event)
                self.started.set()
                if len(self.events) == 4:
                    self.fourth.set()
            self.result = self.job.result()
        except JobError as error:
            self.error = error
            self.started.set()

    def join(self):
        self._thread.join(HANGS_S)
        assert not self._thread.is_alive()
        return self


def running_job(server, **settings):
    job = Background(server, **{**ENDLESS, **settings})
    assert job.started.wait(HANGS_S)
    assert job.error is None
    return job


def waiting_jobs(server, *settings):
    """Jobs that wait behind a running one, in this order."""
    jobs = []
    for each in settings:
        before = server.metric("nv_inference_pending_request_count", version="1")
        jobs.append(Background(server, **each))
        server.wait_for("nv_inference_pending_request_count", before + 1, version="1")
    return jobs


def median_step_s(job):
    ticks = [event for event in job.events if event["phase"] == "denoise"]
    return ticks[-1]["eta_s"] / (ticks[-1]["total"] - ticks[-1]["step"])


def cancelled_after_s(server):
    """Seconds from a cancellation to the end of the job, and the median of its steps."""
    job = running_job(server, **LONG)
    assert job.fourth.wait(HANGS_S)
    cancelled = server.metric("wan22_requests_total", outcome="cancelled")
    given_up_at = time.monotonic()
    job.job.cancel()
    server.wait_for("wan22_in_flight", 0)
    latency_s = time.monotonic() - given_up_at
    assert server.metric("wan22_requests_total", outcome="cancelled") == cancelled + 1
    assert job.join().error.status == "CANCELLED"
    return latency_s, median_step_s(job)


def test_a_running_job_ends_within_a_step_of_its_cancellation(server):
    """The best of a few tries, because the clock runs on while something else has the processor."""
    for _ in range(TRIES):
        latency_s, step_s = cancelled_after_s(server)
        print(f"cancel latency {1000 * latency_s:.0f} ms, step {1000 * step_s:.0f} ms")
        if latency_s <= step_s + 0.1:
            return
    pytest.fail("no cancellation was within a step and 100 ms")


@pytest.mark.parametrize("status", ["CANCELLED", "DEADLINE_EXCEEDED"])
def test_a_job_that_is_given_up_while_it_waits_never_starts(server, status):
    done = server.metric("wan22_requests_total", outcome="done")
    running = running_job(server)
    if status == "CANCELLED":
        (waiting,) = waiting_jobs(server, TINY_JOB)
        waiting.job.cancel()
    else:  # it may be over before anybody sees it wait
        waiting = Background(server, **TINY_JOB, deadline_s=0.3)
    assert waiting.join().error.status == status
    assert (server.metric("wan22_in_flight"), running.error) == (1, None)
    running.job.cancel()
    assert running.join().error.status == "CANCELLED"
    server.wait_for("nv_inference_pending_request_count", 0, version="1")
    assert waiting.events == []
    assert server.metric("wan22_requests_total", outcome="done") == done


def test_jobs_of_one_client_are_followed_and_cancelled_apart(server):
    with server.client() as client:
        running = client.submit({"prompt": "x", **ENDLESS})
        first = next(running.events())
        assert (first["phase"], first["job"]) == ("start", running.id)
        others = [client.submit({"prompt": "x", **TINY_JOB}) for _ in range(2)]
        server.wait_for("nv_inference_pending_request_count", 2, version="1")
        others[0].cancel()
        running.cancel()
        assert others[1].result().event["phase"] == "done"
        for job in (running, others[0]):
            with pytest.raises(JobError) as error:
                job.result()
            assert error.value.status == "CANCELLED"
        others[1].cancel()  # nothing to end any more
        assert others[1].result().video


def test_leaving_a_client_cancels_its_jobs(server):
    cancelled = server.metric("wan22_requests_total", outcome="cancelled")
    with server.client() as client:
        assert next(client.submit({"prompt": "x", **ENDLESS}).events())["phase"] == "start"
    server.wait_for("wan22_requests_total", cancelled + 1, outcome="cancelled")


def test_a_client_that_is_killed_takes_its_job_along(server):
    cancelled = server.metric("wan22_requests_total", outcome="cancelled")
    code = (
        "from triton_repo.client import WanClient\n"
        f"WanClient({server.url!r}).generate('x', on_progress=lambda e: print(e['phase'], flush=True), **{LONG!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        while "denoise" not in client.stdout.readline():
            pass
        client.kill()
    server.wait_for("wan22_requests_total", cancelled + 1, outcome="cancelled")


def test_ctrl_c_of_the_client_command_cancels_the_job(server, tmp_path):
    cancelled = server.metric("wan22_requests_total", outcome="cancelled")
    line = ["client", server.url, "x", "-o", str(tmp_path / "o.mp4"), "--size", "256x160", "--steps", "60"]
    code = f"from wan_trt.cli import app; app({line!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
        server.wait_for("wan22_in_flight", 1)
        client.send_signal(signal.SIGINT)
        assert b"interrupted" in client.communicate(timeout=HANGS_S)[1]
        assert client.returncode == 130
    server.wait_for("wan22_requests_total", cancelled + 1, outcome="cancelled")
    assert list(tmp_path.iterdir()) == []


def test_a_browser_that_leaves_takes_its_job_along(server):
    cancelled = server.metric("wan22_requests_total", outcome="cancelled")
    connection = http.client.HTTPConnection("127.0.0.1", server.options.http_port, timeout=HANGS_S)
    connection.request("POST", "/v2/models/wan22/generate_stream", json.dumps({"prompt": "x", **LONG}))
    assert b"start" in connection.getresponse().readline()
    connection.close()
    server.wait_for("wan22_requests_total", cancelled + 1, outcome="cancelled")


def test_a_full_queue_refuses_at_once_and_says_so(server):
    running = running_job(server)
    waiting = waiting_jobs(server, *[TINY_JOB] * QUEUE)
    one_too_many = Background(server, **TINY_JOB).join()
    assert (server.metric("wan22_in_flight"), running.error) == (1, None)  # it did not have to wait for that one
    assert one_too_many.error.status == "UNAVAILABLE"
    assert "Exceeds maximum queue size" in str(one_too_many.error)
    running.job.cancel()
    assert all(job.join().result for job in waiting)


def test_urgent_jobs_go_first(server):
    running = running_job(server)
    jobs = waiting_jobs(server, TINY_JOB, TINY_JOB, {**TINY_JOB, "priority": 1})
    running.job.cancel()
    running.join()
    first, second, urgent = (job.join().result.event["started_unix_ms"] for job in jobs)
    assert urgent < first < second


def test_a_deadline_ends_a_running_job(server):
    job = Background(server, **LONG, deadline_ms=1000).join()
    assert job.error.status == "DEADLINE_EXCEEDED"
    assert "deadline of the request has passed" in str(job.error)
    assert job.events


def test_draining_waits_for_running_and_waiting_jobs(server, tmp_path):
    flag = tmp_path / "drain"
    running = running_job(server, steps=25, preview=False)
    (waiting,) = waiting_jobs(server, TINY_JOB)
    metrics = f"http://127.0.0.1:{server.options.metrics_port}/metrics"
    assert not probe.drain(metrics, flag, within_s=0.2, every_s=0.05)
    assert running.result is None
    assert probe.drain(metrics, flag, within_s=300, every_s=0.05)
    assert flag.exists()
    assert (server.metric("wan22_in_flight"), running.join().error, waiting.join().error) == (0, None, None)


def test_fifty_requests_from_eight_clients_leave_nothing_behind(server):
    def ask(client):
        """Again and again, until the queue has a place."""
        answers = []
        while "done" not in answers:
            try:
                answers.append(client.generate("x", **TINY_JOB).event["phase"])
            except JobError as error:
                answers.append(error.status)
                time.sleep(0.05)
        return answers

    def caller(count):
        with server.client() as client:
            return [answer for _ in range(count) for answer in ask(client)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller, [2] * 8))  # buffers grow to their size
        rss, regions = server.rss_bytes(), server.regions()
        answers = Counter(answer for part in pool.map(caller, [7, 7, 6, 6, 6, 6, 6, 6]) for answer in part)
    grown = server.rss_bytes() - rss
    print(f"{dict(answers)}, RSS {rss / 2**20:.0f} MiB {grown / 2**20:+.1f} MiB, {len(regions)} regions")
    assert answers["done"] == 50
    assert set(answers) <= {"done", "UNAVAILABLE"}
    assert grown < 32 * 2**20
    assert server.regions() == regions
