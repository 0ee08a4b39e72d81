"""Gateways, servers and databases that die: no accepted job is lost, and none is made twice."""

import signal
import subprocess
import time
from contextlib import contextmanager

import pytest

from tests.gateway.postgres import postgres
from tests.gateway.running import LONG, MEDIUM, SMALL, WAN_TRT, gateway_in_front, start, wait_until_ready
from tests.triton_repo.serving import serving


@contextmanager
def stopped(process):
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def account(gateway):
    """Every video of a gateway by id, after a check that files and records match."""
    listed, after = {}, ""
    while True:
        page = gateway.ask("GET", f"/v1/videos?limit=100{after}").json
        listed |= {video["id"]: video for video in page["data"]}
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    files = {path.name.partition(".")[0] for path in (gateway.data / "videos").iterdir() if path.name[0] != "."}
    assert files == {video_id for video_id, video in listed.items() if video["status"] == "completed"}
    return listed


def test_a_killed_gateway_goes_on_where_it_was(triton, tmp_path):
    servers = [triton.url]
    gateway = wait_until_ready(start(tmp_path / "data", servers))
    try:
        done, running = gateway.create(), gateway.create(**MEDIUM)
        waiting = [gateway.create(seed=at) for at in range(3)]
        deleted = gateway.create()
        gateway.ask("DELETE", f"/v1/videos/{deleted}")
        gateway.wait(running, "in_progress")
        while (seen := gateway.wait(running, "in_progress"))["step"] < 5:
            time.sleep(0.02)
        gateway.kill()
        (tmp_path / "data" / "videos" / "stranger.mp4").write_bytes(b"of no record")
        triton.wait_for("wan22_in_flight", 0)  # a job without its gateway ends
        gateway = wait_until_ready(start(tmp_path / "data", servers, port=gateway.port))
        again = gateway.video(running)
        assert again["status"] in ("queued", "in_progress")
        assert again["progress"] >= seen["progress"]
        for video_id in (running, *waiting):
            gateway.wait(video_id, "completed")
        assert account(gateway).keys() == {done, running, *waiting}
    finally:
        gateway.kill()


def test_a_gateway_that_is_told_to_end_keeps_its_queue(triton, tmp_path):
    with gateway_in_front(tmp_path / "data", [triton.url], "--finish-within", 60) as gateway:
        running, waiting = gateway.create(**MEDIUM), gateway.create()
        gateway.wait(running, "in_progress")
        gateway.process.terminate()
        while (answer := gateway.ask("GET", "/ready")).status == 200:
            time.sleep(0.01)
        assert answer.error["code"] == "server_shutdown"
        refused = gateway.ask("POST", "/v1/videos", {"prompt": "x", **SMALL})
        assert (refused.status, refused.headers["retry-after"]) == (503, "30")
        assert gateway.process.wait(60) == 0
    with gateway_in_front(tmp_path / "data", [triton.url]) as gateway:
        assert gateway.video(running)["status"] == "completed"
        gateway.wait(waiting, "completed")


def test_two_gateways_do_not_share_a_folder(gateway, triton):
    second = start(gateway.data, [triton.url])
    assert second.process.wait(60) == 2
    log = (gateway.data.parent / f"{gateway.data.name}.log").read_text()
    assert "is used by a running gateway | expected a folder of its own" in log


def test_a_database_that_is_away_loses_nothing(triton, tmp_path):
    with postgres() as database:
        options = ["--database", database.url]
        with gateway_in_front(tmp_path / "data", [triton.url], *options) as gateway:
            running, waiting = gateway.create(**MEDIUM), gateway.create()
            gateway.wait(running, "in_progress")
            made = triton.metric("wan22_requests_total", outcome="done")
            database.stop()
            for method, path, body in (
                ("GET", f"/v1/videos/{running}", None),
                ("POST", "/v1/videos", {"prompt": "x", **SMALL}),
            ):
                answer = gateway.ask(method, path, body)
                assert (answer.status, answer.error["code"]) == (503, "database_unavailable")
                assert "x-should-retry" in {name.lower() for name in answer.headers}
            triton.wait_for("wan22_in_flight", 0)  # the job goes on to its end
            database.start()
            for video_id in (running, waiting):
                gateway.wait(video_id, "completed")
            assert account(gateway).keys() == {running, waiting}
            assert triton.metric("wan22_requests_total", outcome="done") == made + 2  # none was made again


@pytest.mark.slow
def test_two_gateways_share_a_queue_and_one_takes_over_from_the_other(triton, tmp_path):
    with postgres() as database:
        options = ["--database", database.url, "--videos", tmp_path / "shared"]
        first = wait_until_ready(start(tmp_path / "one", [triton.url], *options))
        with gateway_in_front(tmp_path / "two", [triton.url], *options) as second:
            running = first.create(**LONG)
            first.wait(running, "in_progress")
            assert second.video(running)["status"] == "in_progress"
            with stopped(first.process):  # it still holds its connection, so the server still works
                assert second.ask("DELETE", f"/v1/videos/{running}").status == 200
                assert second.ask("GET", f"/v1/videos/{running}").status == 404
            triton.wait_for("wan22_in_flight", 0)
            kept = first.create(**MEDIUM)
            second.wait(kept, "in_progress")
            first.kill()
            second.wait(kept, "completed", within_s=120)


@pytest.mark.slow
def test_a_server_that_dies_gives_its_job_back_once(installation, tiny_engines, tmp_path):
    """The second server that dies with it is the client's answer."""
    for name in "ab":
        (tmp_path / name).mkdir()
    with (
        serving(installation, tmp_path / "a", {"wan22": tiny_engines}) as one,
        serving(installation, tmp_path / "b", {"wan22": tiny_engines}) as two,
        gateway_in_front(tmp_path / "data", [one.url, two.url]) as gateway,
    ):
        job = gateway.create(**LONG)
        servers = {server.url: server for server in (one, two)}
        gateway.wait(job, "in_progress")
        (first,) = [server for server in servers.values() if server.metric("wan22_in_flight") == 1]
        other = next(server for server in servers.values() if server is not first)
        seen = gateway.wait(job, "in_progress")["progress"]
        for process in (*first.stubs(), first.process):
            process.kill()
        other.wait_for("wan22_in_flight", 1)
        assert gateway.wait(job, "in_progress")["progress"] >= seen
        for process in (*other.stubs(), other.process):
            process.kill()
        failed = gateway.wait(job, "failed")
        assert failed["error"]["code"] == "engine_lost"
        assert gateway.ask("GET", "/health").status == 200
        account(gateway)


@pytest.mark.slow
def test_records_move_from_sqlite_to_postgresql(triton, tmp_path):
    data = tmp_path / "data"
    subprocess.run([WAN_TRT, "gateway", "key", "add", "ann", "--data", data], check=True, capture_output=True)
    made = subprocess.run([WAN_TRT, "gateway", "key", "add", "bob", "--data", data], check=True, capture_output=True)
    (tmp_path / "data.log").touch()
    gateway = wait_until_ready(start(data, [triton.url]), "/health")
    gateway.key = made.stdout.decode().strip()
    wait_until_ready(gateway)
    done, running, waiting = gateway.create(), gateway.create(**LONG), gateway.create()
    gateway.wait(running, "in_progress")
    with postgres() as database:
        move = [WAN_TRT, "gateway", "move", "--data", data, "--database", database.url]
        refused = subprocess.run(move, check=False, capture_output=True, text=True)
        assert (refused.returncode, "is used by a running gateway" in refused.stderr) == (2, True)
        gateway.kill()
        assert b"records moved" in subprocess.run(move, check=True, capture_output=True).stdout
        again = subprocess.run(move, check=False, capture_output=True, text=True)
        assert (again.returncode, "expected an empty database" in again.stderr) == (2, True)
        for words in (["--server", triton.url], ["key", "list"]):  # its jobs would run twice
            old = [WAN_TRT, "gateway", *words, "--data", data]
            refused = subprocess.run(old, check=False, capture_output=True, text=True, timeout=60)
            assert (refused.returncode, "name the other one with --database" in refused.stderr) == (2, True)
        options = ["--database", database.url, "--videos", data / "videos", "--finish-within", 0]
        with gateway_in_front(data, [triton.url], *options, path="/health") as moved:
            moved.key = gateway.key
            assert moved.ask("GET", f"/v1/videos/{done}/content").status == 200
            assert moved.ask("DELETE", f"/v1/videos/{running}").status == 200
            moved.wait(waiting, "completed")
