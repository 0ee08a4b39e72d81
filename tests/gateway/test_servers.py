"""Servers that come and go behind a name, keys that must be there, and the metric that the autoscaler asks for."""

import json
import re
import subprocess
import time

import pytest

from gateway import workers as module
from gateway.claims import Claims
from gateway.database import Database, sqlite_url
from gateway.metrics import GatewayMetrics
from gateway.store import open_store
from gateway.sweep import Keep, Sweep
from gateway.worker import Surroundings
from gateway.workers import Workers, addresses
from tests.gateway.running import WAN_TRT, gateway_in_front, start, wait_until_ready
from triton_repo.manifests import ClusterOptions, manifests
from triton_repo.repository import RepositoryOptions, write_repository
from wan_trt.cli import app


def test_a_gateway_finds_the_servers_behind_a_name_and_wants_keys_before_there_are_any(triton, tmp_path):
    port = triton.url.rpartition(":")[2]
    data, url = tmp_path / "data", tmp_path / "url"
    url.write_text(f"sqlite:///{tmp_path / 'elsewhere.sqlite'}\n")
    database = ["--database", f"@{url}"]
    options = ["--require-keys", "--address", "0.0.0.0", "--finish-within", 0, *database]
    with gateway_in_front(data, [f"dns:localhost:{port}"], *options) as gateway:
        refused = gateway.ask("GET", "/v1/videos")
        assert (refused.status, refused.error["code"]) == (401, "missing_api_key")
        add = [WAN_TRT, "gateway", "key", "add", "ann", "--data", data, *database]
        gateway.key = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
        while gateway.ask("GET", "/v1/videos").status == 401:
            time.sleep(0.05)
        gateway.wait(gateway.create(), "completed")


def test_a_server_whose_address_is_gone_gets_no_more_jobs_and_comes_back(triton, tmp_path, monkeypatch):
    there = {triton.url, "127.0.0.1:1"}
    monkeypatch.setattr(module, "addresses", lambda _name: set(there))
    monkeypatch.setattr(module, "FIND_S", 0.05)
    database = Database(sqlite_url(tmp_path))
    claims, store, metrics = Claims(database, 5.0), open_store(str(tmp_path / "videos")), GatewayMetrics(dict)
    around = Surroundings(claims, store, lambda _id: None, None, metrics.ended, metrics.phase)
    found = Workers(["dns:servers:8001"], "wan22", around, Sweep(database, claims, store, Keep()), "g")
    found.start()
    try:
        assert {worker.server.url for worker in found.all} == there
        (first,) = (worker for worker in found.all if worker.server.url == triton.url)
        until(found.models)
        there.remove(triton.url)
        until(lambda: not first.is_alive() and len(found.all) == 1)
        assert not found.models()
        there.add(triton.url)
        until(found.models)
        assert len({worker.name for worker in (first, *found.all)}) == 3
    finally:
        found.stop(0.0)
    there.add("127.0.0.1:2")
    time.sleep(0.2)
    assert len(found.all) == 2  # an end starts nobody


def until(true):
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < 30
        time.sleep(0.02)


def test_addresses_of_a_name():
    assert "127.0.0.1:8001" in addresses("localhost:8001")
    assert addresses("[::1]:8001") == {"[::1]:8001"}


def test_the_autoscaler_asks_for_a_metric_that_the_gateway_has(gateway, tiny_engines, tmp_path):
    options = RepositoryOptions()
    made = manifests(write_repository(tiny_engines, tmp_path / "repository", options), options, ClusterOptions())
    (query,) = (each["spec"]["triggers"][0]["metadata"]["query"] for each in made if each["kind"] == "ScaledObject")
    name, selected = re.search(r"(\w+)\{(.*)\}", query).groups()
    wanted = dict(re.findall(r'(\w+)=~?"([^"]*)"', selected))
    del wanted["namespace"]  # added by Prometheus
    video_id = gateway.create(num_inference_steps=50)
    lines = gateway.ask("GET", "/metrics").body.decode().splitlines()
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines if line.startswith(f"{name}{{")]
    assert any(all(re.fullmatch(wanted[key], each[key]) for key in wanted) for each in labels)
    gateway.ask("DELETE", f"/v1/videos/{video_id}")


def test_a_batch_renders_through_gateways_and_triton_servers(triton, gateway, tmp_path, capsys):
    """A gateway's video has the bytes of the server behind it, and the batch leaves nothing there."""
    small = {"size": "64x64", "num_frames": 5, "steps": 2, "guidance": 3.0}
    lines = [{"name": f"j{n}", "prompt": f"Cat {n}", "look": "noir", "seed": n, **small} for n in range(3)]
    lines += [
        {"name": "still", "prompt": "x", **small, "output_format": "png"},
        {"name": "odd", "prompt": "x", "steps": 999},
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = gateway.ask("GET", "/v1/videos?limit=100").json["data"]
    for name, server in (("triton", triton.url), ("gateway", gateway.url)):
        with pytest.raises(SystemExit) as left:
            app(["batch", str(jobs), str(tmp_path / name), "--server", server])
        assert left.value.code == 1
        told = capsys.readouterr().out
        assert "odd (line 5) failed" in told
        assert "run of 999 steps" in told
    assert "still (line 4) failed: output_format 'png' | expected one of mp4, webm" in told
    for n in range(3):
        assert (tmp_path / "gateway" / f"j{n}.mp4").read_bytes() == (tmp_path / "triton" / f"j{n}.mp4").read_bytes()
    assert gateway.ask("GET", "/v1/videos?limit=100").json["data"] == before


def test_a_batch_needs_a_gateways_key_and_outlives_its_restart(triton, tmp_path, monkeypatch, capsys):
    data, jobs = tmp_path / "data", tmp_path / "jobs.jsonl"
    lines = [{"name": f"j{n}", "prompt": f"Cat {n}", "size": "128x96", "num_frames": 9, "steps": 20} for n in range(3)]
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    add = [WAN_TRT, "gateway", "key", "add", "ann", "--data", data]
    key = subprocess.run(add, capture_output=True, text=True, check=True).stdout
    (tmp_path / "key").write_text(key)
    command = ["batch", str(jobs), str(tmp_path / "out"), "--server"]
    with gateway_in_front(data, [triton.url], "--finish-within", 0) as gateway:
        gateway.key = key.strip()
        monkeypatch.setenv("WAN_TRT_KEY", "wan_wrong")
        with pytest.raises(SystemExit) as left:
            app([*command, gateway.url])
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert "set WAN_TRT_KEY" in told
        assert told.count("expected") == 1
        words = [WAN_TRT, *command, f"{gateway.url}/v1", "--key", tmp_path / "key"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            while not any(v["status"] == "in_progress" for v in gateway.ask("GET", "/v1/videos").json["data"]):
                assert process.poll() is None
                time.sleep(0.02)
            gateway.kill()
            again = wait_until_ready(start(data, [triton.url], "--finish-within", 0, port=gateway.port))
            try:
                told = process.communicate(timeout=120)[0]
            finally:
                again.kill()
    assert "3 done, 0 failed" in told
