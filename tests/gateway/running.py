"""A gateway as a process of its own, in front of real servers, and what tests ask it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triton_repo.server import free_ports

warnings.filterwarnings("ignore", category=DeprecationWarning, module="openai")
WAN_TRT = str(Path(sys.executable).with_name("wan-trt"))
SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 3}
MEDIUM = {"size": "128x96", "num_frames": 9, "num_inference_steps": 20}
LONG = {"size": "256x160", "num_frames": 17, "num_inference_steps": 100}  # some 0.1 s a step; to be given up


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


@dataclass
class Gateway:
    port: int
    data: Path
    process: subprocess.Popen
    key: str = ""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, **headers):
        """One request; dicts are sent as JSON."""
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key:
            named.setdefault("authorization", f"Bearer {self.key}")
        request = urllib.request.Request(self.url + path, body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers.items()), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers.items()), error.read())

    def create(self, **fields):
        answer = self.ask("POST", "/v1/videos", {"prompt": "a fox", **SMALL, **fields})
        assert answer.status == 200, answer.body
        return answer.json["id"]

    def video(self, video_id):
        return self.ask("GET", f"/v1/videos/{video_id}").json

    def wait(self, video_id, *statuses, within_s=60.0, **wanted):
        """The video object once it has one of the statuses, and the wanted values."""
        started = time.monotonic()
        while True:
            video = self.video(video_id)
            matches = not statuses or video.get("status") in statuses
            if matches and all(video.get(name) == value for name, value in wanted.items()):
                return video
            assert time.monotonic() - started < within_s, video
            time.sleep(0.02)

    def client(self, **options):
        import openai

        options = {"api_key": self.key or "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def kill(self):
        self.process.kill()
        self.process.wait()


def start(data, servers, *options, port=None):
    """A gateway that has been started; see :func:`wait_until_ready`."""
    port = port or free_ports(1)[0]
    named = [word for server in servers for word in ("--server", server)]
    command = [WAN_TRT, "gateway", *named, "--data", str(data), "--port", str(port), *map(str, options)]
    with (data.parent / f"{data.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    return Gateway(port, data, process)


def wait_until_ready(gateway, path="/ready", within_s=60.0):
    started = time.monotonic()
    while True:
        try:
            if gateway.ask("GET", path).status == 200:
                return gateway
        except OSError:
            log = gateway.data.parent / f"{gateway.data.name}.log"
            assert gateway.process.poll() is None, log.read_text()
        assert time.monotonic() - started < within_s, "not ready"
        time.sleep(0.05)


@contextmanager
def gateway_in_front(data, servers, *options, path="/ready"):
    gateway = start(data, servers, *options)
    try:
        yield wait_until_ready(gateway, path)
    finally:
        if gateway.process.poll() is None:
            gateway.process.send_signal(signal.SIGTERM)
            try:
                gateway.process.wait(30)
            except subprocess.TimeoutExpired:
                gateway.kill()
