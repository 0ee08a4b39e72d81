"""A real tritonserver on free ports of loopback, and what tests look at from outside."""

import os
import shutil
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from triton_repo.client import WanClient
from triton_repo.repository import RepositoryOptions, write_repository
from triton_repo.server import ServeOptions, Server, free_ports, is_ready, run_server
from triton_repo.settings import Limits

HANGS_S = 600.0  # after which a test is taken to hang, on the busiest machine
SMALL = {"width": 64, "height": 64, "num_frames": 5, "steps": 3}
LONG = {"width": 256, "height": 160, "num_frames": 17, "steps": 60}  # 0.1 s a step or so; to be given up


@dataclass(frozen=True)
class Served:
    server: Server

    @property
    def process(self):
        return self.server.process

    @property
    def options(self):
        return self.server.options

    @property
    def url(self):
        return f"127.0.0.1:{self.options.grpc_port}"

    @property
    def http(self):
        return f"http://127.0.0.1:{self.options.http_port}"

    def is_ready(self):
        return is_ready(self.http)

    def client(self, model="wan22"):
        return WanClient(self.url, model)

    def metrics(self):
        """Every series as it is printed, by name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.options.metrics_port}/metrics", timeout=HANGS_S) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in "#")}

    def metric(self, name, model="wan22", **labels):
        shown = "".join(f',{key}="{value}"' for key, value in labels.items())
        return self.metrics()[f'{name}{{model="{model}"{shown}}}']

    def wait_for(self, name, value, within_s=HANGS_S, model="wan22", **labels):
        """Seconds until a metric has that value."""
        started = time.monotonic()
        while (found := self.metric(name, model, **labels)) != value:
            assert time.monotonic() - started < within_s, f"{name} is {found}, not {value}"
            time.sleep(0.005)
        return time.monotonic() - started

    def stubs(self):
        return psutil.Process(self.process.pid).children()

    def rss_bytes(self):
        return sum(p.memory_info().rss for p in (psutil.Process(self.process.pid), *self.stubs()))

    def regions(self):
        return sorted(Path("/dev/shm").glob(f"{self.options.region_prefix}*"))


@contextmanager
def serving(installation, folder, engines, topology="owner", options=None, added="", **limits):
    """A server of ``engines``, bundles by model name, that is ready; it and its shared memory are gone afterwards.

    ``options`` are those of a model's repository, by its name; ``added`` is code behind that of every model.
    """
    repository = folder / "repository"
    repository.mkdir()
    for name, bundle in engines.items():
        own = (options or {}).get(name, {})
        write_repository(bundle, folder / name, RepositoryOptions(name, topology, limits, **own))
        for model in folder.glob(f"{name}/{name}*"):
            shutil.move(model, repository / model.name)
    for code in repository.glob("*/1/model.py"):
        code.write_text(code.read_text() + added)
    serve = ServeOptions("127.0.0.1", *free_ports(3), config_name="cpu" if topology == "bls" else "")
    enough = Limits(1, 1, longest_job_s=limits.get("longest_job_s", 60))
    with run_server(installation, repository, enough, serve, os.environ) as server:
        server.wait_until_ready(within_s=HANGS_S)
        yield Served(server)
