"""Folders and buckets give back what they took, whole, and say so when they cannot."""

import os
import shutil
import subprocess
import time
import urllib.request

import pytest

from gateway.store import BucketStore, FolderStore, StoreError, open_store
from tests.gateway.running import gateway_in_front
from triton_repo.server import free_ports
from wan22.errors import UserError

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "y",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    if request.param == "folder":
        return FolderStore(tmp_path / "videos")
    return BucketStore(pytest.importorskip("obstore.store").MemoryStore())


def test_a_store_gives_back_what_it_took(store):
    content = bytes(range(256)) * 1000
    store.put("a.mp4", content)
    store.put("b.mp4", b"b")
    reader = store.open("a.mp4")
    assert reader.size_bytes == len(content)
    assert reader.read(0, len(content)) == content
    assert reader.read(1000, 5) == content[1000:1005]
    assert store.sizes() == {"a.mp4": len(content), "b.mp4": 1}
    store.put("b.mp4", b"again")
    store.remove("a.mp4")
    store.remove("a.mp4")
    assert store.open("a.mp4") is None
    assert store.sizes() == {"b.mp4": 5}
    reader.close()


def test_what_a_killed_writer_left_is_no_video_and_is_removed_later(tmp_path):
    store = FolderStore(tmp_path)
    part = tmp_path / ".a.mp4.1.part"
    part.write_bytes(b"half")
    assert store.sizes() == {}
    assert part.exists()  # its writer may be alive
    os.utime(part, (time.time() - 7200,) * 2)
    assert store.sizes() == {}
    assert not part.exists()


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """An S3 of moto with the bucket ``videos``."""
    if not (program := shutil.which("moto_server")):
        pytest.skip("needs moto_server (pip install 'moto[server,s3]')")
    (port,) = free_ports(1)
    server = subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT": url}.items():
        monkeypatch.setenv(name, value)
    for _ in range(600):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/videos", method="PUT"), timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    yield server
    server.kill()
    server.wait()


def test_a_gateway_with_a_bucket_loses_nothing_while_the_bucket_is_away(s3, triton, tmp_path):
    with gateway_in_front(
        tmp_path / "data", [triton.url], "--videos", "s3://videos/made", "--finish-within", 0
    ) as gateway:
        kept = gateway.create(seed=3)
        gateway.wait(kept, "completed")
        whole = gateway.ask("GET", f"/v1/videos/{kept}/content")
        part = gateway.ask("GET", f"/v1/videos/{kept}/content", range="bytes=10-19")
        assert (part.status, part.body) == (206, whole.body[10:20])
        assert open_store("s3://videos/made").sizes().keys() == {f"{kept}.1.mp4"}
        assert gateway.ask("DELETE", f"/v1/videos/{kept}").status == 200
        assert open_store("s3://videos/made").sizes() == {}
        kept = gateway.create(seed=3)
        gateway.wait(kept, "completed")
        s3.kill()
        refused = gateway.ask("GET", f"/v1/videos/{kept}/content")
        assert (refused.status, refused.error["code"]) == (503, "storage_failed")
        assert gateway.video(kept)["status"] == "completed"


def test_a_bucket_that_does_not_answer_is_told_at_the_start(monkeypatch):
    pytest.importorskip("obstore")
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"videos at s3://videos: .* \| expected a folder, or a bucket that answers"):
        open_store("s3://videos")


def test_a_refusal_is_an_error_with_a_code(monkeypatch):
    store = pytest.importorskip("obstore.store")
    options = {"access_key_id": "x", "secret_access_key": "y", "endpoint": f"http://127.0.0.1:{free_ports(1)[0]}"}
    bucket = store.S3Store("videos", **options, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    for call in (lambda s: s.put("a", b"a"), lambda s: s.open("a"), lambda s: s.sizes()):
        with pytest.raises(StoreError) as error:
            call(BucketStore(bucket))
        assert error.value.code == "storage_failed"
