"""Disks that are full, stores that refuse, images of hosts: what the client is told, and that nothing is lost."""

import asyncio
import base64
import io
import resource
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from PIL import Image
from sqlalchemy import text
from starlette.responses import PlainTextResponse

from gateway import outer
from gateway.api_error import ApiError
from gateway.database import SQLITE, Database, sqlite_url
from gateway.images import image_content, public_address
from gateway.outer import Outer
from gateway.start import database_url, only_one
from tests.gateway.running import SMALL, gateway_in_front
from wan22.errors import UserError

FILLER = "filler"


@contextmanager
def small_disk(folder, size):
    """A disk of that size at ``folder``; skips where nobody may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    with (folder / FILLER).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


def test_a_full_disk_is_told_and_nothing_is_lost(triton, tmp_path):
    with (
        small_disk(tmp_path / "data", "4m") as data,
        small_disk(tmp_path / "videos", "1m") as videos,
        gateway_in_front(data, [triton.url], "--videos", videos, "--finish-within", 0) as gateway,
    ):
        kept = gateway.create()
        gateway.wait(kept, "completed")
        fill(videos)
        stuck = gateway.create()
        log = data.parent / f"{data.name}.log"
        while "the video could not be stored" not in log.read_text():
            assert gateway.video(stuck)["status"] in ("queued", "in_progress")
            time.sleep(0.05)
        (videos / FILLER).unlink()
        gateway.wait(stuck, "completed")
        fill(data)
        answers = [gateway.ask("POST", "/v1/videos", {"prompt": "x" * 10_000, **SMALL}) for _ in range(30)]
        refused = [answer for answer in answers if answer.status != 200]
        assert {(answer.status, answer.error["code"]) for answer in refused} == {(503, "storage_full")}
        (data / FILLER).unlink()
        accepted = [answer.json["id"] for answer in answers if answer.status == 200]
        for video_id in (*accepted, gateway.create()):
            gateway.wait(video_id, "completed")
        assert gateway.video(kept)["status"] == "completed"
        assert {path.name.partition(".")[0] for path in videos.iterdir()} >= {kept, stuck, *accepted}


def test_videos_are_kept_no_longer_nor_more_of_them_than_the_operator_wants(triton, tmp_path):
    options = ["--keep-videos", 2, "--finish-within", 0]
    with gateway_in_front(tmp_path / "data", [triton.url], *options) as gateway:
        made = [gateway.create() for _ in range(3)]
        for video_id in made:
            gateway.wait(video_id, "completed")
        while (gone := gateway.ask("GET", f"/v1/videos/{made[0]}/content")).status == 200:
            time.sleep(0.05)
        assert (gone.status, gone.error["code"]) == (404, "expired")
        assert gateway.video(made[0])["expires_at"] <= time.time()
        files = {path.name.partition(".")[0] for path in (tmp_path / "data" / "videos").iterdir()}
        assert files == set(made[1:])


def png(size=(64, 64)):
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "PNG")
    return content.getvalue()


def data_url(content, kind="image/png"):
    return {"image_url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}


def test_an_image_is_an_upload_or_a_data_url():
    assert image_content("input_reference", png(), ()) == image_content("input_reference", data_url(png()), ()) == png()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (b"", "invalid_value"),
        (b"\0" * (20 * 2**20 + 1), "too_large"),
        (data_url(b"\0" * (20 * 2**20 + 1)), "too_large"),
        (data_url(png(), "image/svg+xml"), "invalid_value"),
        ({"image_url": "data:image/png;base64,%%%"}, "invalid_value"),
        ({"image_url": "file:///etc/passwd"}, "invalid_value"),
        ({"image_url": "/etc/passwd"}, "invalid_value"),
        ({"image_url": "http://images.example/x.png"}, "invalid_value"),
        ({"image_url": "https://user@images.example/x.png"}, "invalid_value"),
        ({"image_url": "https://images.example:8443/x.png"}, "host_not_allowed"),
        ({"image_url": "https://other.example/x.png"}, "host_not_allowed"),
        ({"image_url": "https://localhost/x.png"}, "host_not_allowed"),
        ({"image_url": "https://127.0.0.1/x.png"}, "host_not_allowed"),
        ({"image_url": "https://[::1]/x.png"}, "host_not_allowed"),
        ({"image_url": "https://[broken/x.png"}, "invalid_value"),
        ({"image_url": 5}, "invalid_value"),
        ({"image_url": "x", "path": "/etc/passwd"}, "invalid_value"),
        ({"file_id": "file_1"}, "unsupported_value"),
    ],
)
def test_other_images_are_refused(given, code):
    with pytest.raises(ApiError) as error:
        image_content("input_reference", given, {"images.example", "localhost", "127.0.0.1", "::1"})
    assert error.value.code == code


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fe80::1", "::ffff:10.0.0.1"])
def test_a_listed_host_with_a_private_address_is_refused(address):
    with pytest.raises(ApiError) as error:
        public_address("input_reference", address)
    assert error.value.code == "host_not_allowed"
    assert address not in error.value.message


def test_a_body_that_is_too_slow_is_given_up():
    """The layer that counts bodies, with a client that sends a byte and then nothing."""
    told = []

    async def app(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
        except ApiError as error:
            told.append((error.status, error.code))

    async def run():
        first = iter([{"type": "http.request", "body": b"x", "more_body": True}])

        async def receive():
            return next(first, None) or await asyncio.Event().wait()

        await Outer(app, 100, 0.05)({"type": "http"}, receive, None)

    asyncio.run(run())
    assert told == [(408, "timeout")]


@contextmanager
def answering():
    """The port of a server that answers every request at once."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = PlainTextResponse("fine")
        server = uvicorn.Server(uvicorn.Config(app, http=outer.Protocol, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_connections_that_send_nothing_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(outer, "FILES_KEPT", resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 10, raising=False)
    with answering() as port, ExitStack() as stack:
        held, *silent = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(21)
        )
        for _ in range(2):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as answer:
                assert answer.read() == b"fine"
        for connection in (held, *silent[:10]):  # the ones that have been silent for longest
            assert connection.recv(1) == b""


def test_a_head_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(outer, "HEAD_WITHIN_S", 0.1, raising=False)
    with answering() as port, socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while not (answer := connection.recv(1000)).endswith(b"fine"):
            assert answer
        connection.sendall(b"GET / HTTP/1.1\r\nhost:")
        assert connection.recv(1) == b""


def test_a_database_whose_file_is_gone_takes_no_jobs(tmp_path):
    database = Database(sqlite_url(tmp_path))
    with database.write() as connection:
        connection.execute(text("SELECT 1"))
    (tmp_path / SQLITE).rename(tmp_path / "elsewhere")
    with pytest.raises(ApiError, match="removed or replaced") as error, database.write():
        pass
    assert error.value.status == 503
    (tmp_path / "elsewhere").rename(tmp_path / SQLITE)
    with database.write() as connection:
        connection.execute(text("SELECT 1"))


def test_a_file_in_place_of_the_gateways_folder_is_refused(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match=r"data: File exists \| expected a folder"):
        database_url(tmp_path / "data", "")
    with pytest.raises(UserError, match="File exists"), only_one(tmp_path / "data", shared=True):
        pass
