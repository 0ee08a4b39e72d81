"""Servers that come and go behind a name, keys that must be there, and the metric that the autoscaler asks for."""

import re
import subprocess
import time

from gateway import workers as module
from gateway.claims import Claims
from gateway.database import Database, sqlite_url
from gateway.metrics import GatewayMetrics
from gateway.store import open_store
from gateway.sweep import Keep, Sweep
from gateway.worker import Surroundings
from gateway.workers import Workers, addresses
from tests.gateway.running import WAN_TRT, gateway_in_front
from triton_repo.manifests import ClusterOptions, manifests
from triton_repo.repository import RepositoryOptions, write_repository


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
