"""The client of a gateway, in front of what answers like none: one line, never a traceback or an endless wait."""

import json
import socketserver
import threading
import time
from contextlib import suppress

import pytest

from gateway import client as module
from gateway.client import GatewayClient, RefusedError
from wan_trt.cli import app
from wan_trt.recipes.batch import servers

PAGE = b"<html><body>Welcome to our network</body></html>"
MODEL = {"id": "wan22", "aliases": [], "ready_servers": 1}


def answer(body, status="200 OK", length=None, **headers):
    given = {"content-length": len(body) if length is None else length, "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def endless(write, wait_s, piece):
    write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
    while True:
        write(piece)
        time.sleep(wait_s)


@pytest.fixture
def place():
    """``place(behaviour)`` → the address of a server that answers so, with bytes or with what a function writes."""
    open_servers = []

    def serve(behaviour):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                with suppress(OSError):  # the client has left
                    behaviour(self.request.sendall) if callable(behaviour) else self.request.sendall(behaviour)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        open_servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in open_servers:
        server.shutdown()
        server.server_close()


LIES = {
    "a page": answer(PAGE, content_type="text/html"),
    "nothing": answer(b""),
    "cut JSON": answer(b'{"data": [{"id":'),
    "deep JSON": answer(b"[" * 100_000),
    "a list": answer(b"[]"),
    "a number": answer(b"3"),
    "another object": answer(b'{"data": 5, "status": 5, "id": 5}'),
    "models without names": answer(b'{"data": [{}], "status": "failed", "id": "../x y"}'),
    "a refusal of another shape": answer(b'{"error": ["no"]}', "503 Busy", retry_after="9" * 400),
    "less than it says": answer(b"{}", length=1000),
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "too much": lambda write: endless(write, 0, b" " * 65536),
    "one byte after another": lambda write: endless(write, 0.05, b" "),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_every_lie_is_a_refusal_within_the_time(lie, place, monkeypatch):
    monkeypatch.setattr(module, "BACK_S", 0.0)
    client = GatewayClient(place(lie), timeout_s=1.0)
    for call in (client.models, lambda: client.create({}, "once"), lambda: client.follow("video_1")):
        with pytest.raises(RefusedError) as error:
            call()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 700


def test_a_page_is_no_video(place):
    with pytest.raises(RefusedError, match="an answer without a file; is this a gateway"):
        GatewayClient(place(LIES["a page"])).content("video_1")


def test_a_strange_pause_between_questions_is_ignored(place):
    told = answer(json.dumps({"status": "completed"}).encode(), openai_poll_after_ms="nan")
    assert GatewayClient(place(told)).follow("video_1") == {"status": "completed"}


@pytest.mark.parametrize("name", ["a page", "models without names", "too much"])
def test_a_batch_ends_with_one_line(name, place, tmp_path, capsys):
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a fox"}\n')
    with pytest.raises(SystemExit) as left:
        app(["batch", str(tmp_path / "jobs.jsonl"), str(tmp_path / "out"), "--server", place(LIES[name])])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("wan-trt: gateway http://127.0.0.1:")
    assert line.count(" | ") == 2


def test_a_gateway_that_lies_about_jobs_alone_fails_them(place, monkeypatch):
    """Its list of models is right."""
    for there in (module, servers):
        monkeypatch.setattr(there, "BACK_S", 0.0)
    url = place(answer(json.dumps({"data": [MODEL]}).encode()))
    workers = servers.server_workers([url])
    with workers.open(0) as worker, pytest.raises(servers.WorkerLostError, match="an answer without the id of a video"):
        worker.render(servers.Job(1, "a", {"prompt": "a fox"}, ""))
