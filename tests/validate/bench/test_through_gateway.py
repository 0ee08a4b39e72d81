"""What a gateway adds, measured through a real one, and its verdict."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from triton_repo.installation import default_environments, find_installation
from validate.bench.gateway_result import DIRECT, GATEWAY, GROWTH, JOB, STATUS, GatewayBench
from validate.bench.samples import Samples
from validate.bench.through_gateway import answer_times
from wan22.errors import UserError
from wan_trt.cli import app

MIB = 2**20


def left(arguments):
    """Exit code of ``wan-trt bench``."""
    with pytest.raises(SystemExit) as code:
        app(["bench", *map(str, arguments)])
    return code.value.code


@pytest.mark.slow
def test_jobs_and_statuses_are_timed_and_memory_is_watched(tiny_engines, capfd):
    try:
        find_installation(default_environments())
    except UserError as error:
        pytest.skip(f"{error}")
    asked = ["--gateway", "--size", "64x64", "--frames", "5", "--steps", "2", "--runs", "2", "--jobs", "6"]
    code = left([tiny_engines, *asked])
    printed = capfd.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert code == (0 if result["passed"] else 1)
    assert result["same_video"] is True
    assert len(result["triton"]["samples_ms"]) == len(result["gateway"]["samples_ms"]) == 2
    assert 0 < result["status_ms"]["median"] <= result["status_ms"]["p99"]
    assert 20 < result["resident_mib"]["first"] <= result["resident_mib"]["most"] < 1000
    assert 0 < result["processor_ms_per_status"] < 50
    assert set(result["measured"]) == {STATUS, JOB, GROWTH}
    assert "load average" in printed


def test_a_server_that_stalls_is_charged_for_every_request_that_was_due():
    class Stalling(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            time.sleep(max(0.0, stalled_until - time.perf_counter()))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stalled_until = time.perf_counter() + 1.1
        taken = answer_times(server.server_port, "/", rate=100, seconds=1.0)
        server.shutdown()
    assert len(taken) == 100
    # all were due within the stall, and so their mean wait is half of it; a closed loop would have 8 long ones
    assert sum(taken) / len(taken) > 0.4


@pytest.mark.parametrize(
    ("through", "status", "growth_bytes", "passed"),
    [(1.01, 0.004, 0, True), (1.05, 0.004, 0, False), (1.01, 0.006, 0, False), (1.01, 0.004, 20_000, False)],
    ids=["within the targets", "slow jobs", "slow statuses", "a leak"],
)
def test_jobs_statuses_and_growth_count(through, status, growth_bytes, passed):
    samples = {DIRECT: Samples((1.0, 1.0, 1.0)), GATEWAY: Samples((through, through, 9.0))}
    rss = [(job, 100 * MIB + job * growth_bytes) for job in range(1, 101)]
    found = GatewayBench({}, samples, [0.001], [status, status, 1.0], rss, same_video=True)
    assert bool(found) is passed
    assert found.growth_mib == pytest.approx(1000 * growth_bytes / MIB, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--jobs", 3], "add --gateway"), (["--gateway", "--triton"], "engines alone")],
)
def test_options_that_do_not_go_together_are_refused(tiny_engines, capsys, options, message):
    assert left([tiny_engines, *options]) == 2
    assert message in capsys.readouterr().err
