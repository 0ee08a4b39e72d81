"""Many clients, several servers and gateways that are killed at random: every accepted job is accounted for.

``WAN_TRT_CHAOS_JOBS`` sets the number of jobs, ``WAN_TRT_CHAOS_SEED`` what is killed when.
"""

import collections
import os
import random
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from http.client import HTTPException

import psutil
import pytest
from sqlalchemy import create_engine, text

from tests.gateway.postgres import postgres
from tests.gateway.running import SMALL, start, wait_until_ready
from triton_repo.repository import write_repository
from triton_repo.server import ServeOptions, free_ports, run_server
from triton_repo.settings import Limits

JOBS = int(os.environ.get("WAN_TRT_CHAOS_JOBS", "40"))
SEED = int(os.environ.get("WAN_TRT_CHAOS_SEED", "0"))
CLIENTS, SERVERS, GATEWAYS = 20, 3, 2
FIELDS = {"prompt": "a fox", "seed": 5, **SMALL}  # the same video for everybody
STABLE = {"engine_lost"}


class Server:
    """A tritonserver that can be killed and started again on its ports."""

    def __init__(self, installation, repository):
        self._installation, self._repository = installation, repository
        self._options = ServeOptions("127.0.0.1", *free_ports(3), quiet=True)
        self.url = f"127.0.0.1:{self._options.grpc_port}"
        self.start()

    def start(self):
        self._stack = ExitStack()
        options = replace(self._options, region_prefix=f"wan22_{os.urandom(4).hex()}_")
        started = run_server(self._installation, self._repository, Limits(1, 1), options, os.environ)
        self._server = self._stack.enter_context(started)

    def wait(self):
        self._server.wait_until_ready(within_s=240)

    def kill(self):
        process = self._server.process
        for each in (*psutil.Process(process.pid).children(), process):
            each.kill()
        self._stack.close()


@dataclass
class Client:
    """Creates jobs and follows them, over whichever gateway answers; it never gives up a job."""

    gateways: list
    number: int
    most: int
    accepted: dict = field(default_factory=dict)  # id → what was last seen of it
    deleted: set = field(default_factory=set)
    waits: list = field(default_factory=list)

    def run(self):
        chance = random.Random(1000 * SEED + self.number)
        for at in range(self.most):
            key = f"client-{self.number}-job-{at}"
            started = time.monotonic()
            job = self.insist("POST", "/v1/videos", FIELDS, idempotency_key=key).json["id"]
            again = self.insist("POST", "/v1/videos", FIELDS, idempotency_key=key).json["id"]
            assert job == again
            self.accepted[job] = None
            if chance.random() < 0.1:
                time.sleep(chance.random())
                self.insist("DELETE", f"/v1/videos/{job}")
                self.deleted.add(job)
                continue
            while (video := self.insist("GET", f"/v1/videos/{job}").json)["status"] not in ("completed", "failed"):
                assert time.monotonic() - started < 600, video
                time.sleep(0.25)
            self.accepted[job] = video
            self.waits.append(time.monotonic() - started)

    def insist(self, method, path, body=None, **headers):
        """The answer of the first gateway that gives one; a DELETE that was answered before is a 404."""
        for attempt in range(10_000):
            gateway = self.gateways[(self.number + attempt) % len(self.gateways)]
            try:
                answer = gateway.ask(method, path, body, **headers)
            except (OSError, HTTPException):
                time.sleep(0.2)
                continue
            if answer.status in (429, 503):
                time.sleep(0.2)
                continue
            assert answer.status == 200 or (method == "DELETE" and answer.status == 404), answer.body
            return answer
        raise AssertionError(f"{method} {path}: no gateway answers")


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request, tmp_path):
    """Number of gateways, their options, and the address of their database for this test's own look."""
    if request.param == "sqlite":
        yield 1, [], f"sqlite:///{tmp_path / 'gateway0' / 'gateway.sqlite'}"
        return
    with postgres() as database:
        yield GATEWAYS, ["--database", database.url], database.url.replace("postgresql", "postgresql+psycopg")


@pytest.mark.slow
def test_every_job_is_accounted_for_while_gateways_and_servers_are_killed(installation, tiny_engines, tmp_path, shared):
    count, options, database = shared
    chance, killed = random.Random(SEED), collections.Counter()
    write_repository(tiny_engines, tmp_path / "repository")
    with ExitStack() as stack:
        servers = [Server(installation, tmp_path / "repository") for _ in range(SERVERS)]
        for server in servers:
            server.wait()
            stack.callback(server.kill)
        options = [*options, "--videos", tmp_path / "videos", "--queue-size", 1000]
        urls = [server.url for server in servers]
        gateways = [start(tmp_path / f"gateway{at}", urls, *options) for at in range(count)]
        for gateway in gateways:
            wait_until_ready(gateway, within_s=120)
        try:
            clients = [Client(gateways, at, -(-JOBS // CLIENTS)) for at in range(CLIENTS)]
            threads = [threading.Thread(target=client.run) for client in clients]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(chance.uniform(1, 4))
                if sum(killed.values()) * 10 >= JOBS and len(killed) == 2:  # let the rest go on in peace
                    for thread in threads:
                        thread.join()
                elif (killed["gateway"] <= killed["server"]) if len(killed) < 2 else (chance.random() < 0.5):
                    at = chance.randrange(count)
                    gateways[at].kill()
                    gateways[at] = start(tmp_path / f"gateway{at}", urls, *options, port=gateways[at].port)
                    killed["gateway"] += 1
                else:
                    at = chance.randrange(SERVERS)
                    servers[at].kill()
                    servers[at].start()
                    killed["server"] += 1
            report = account(clients, gateways, database, tmp_path / "videos")
        finally:
            for gateway in gateways:
                gateway.kill()
        print(f"killed {dict(killed)}; {report}; load {os.getloadavg()[0]:.0f}")


def account(clients, gateways, database, videos):
    """Compare what clients saw with the records, the files and the events."""
    accepted = {job for client in clients for job in client.accepted}
    deleted = {job for client in clients for job in client.deleted}
    seen = {job: video for client in clients for job, video in client.accepted.items() if video is not None}
    assert len(accepted) == sum(client.most for client in clients)
    assert seen.keys() == accepted - deleted
    gateway = next(g for g in gateways if g.process.poll() is None)
    wait_until_ready(gateway, "/health")
    listed, after = {}, ""
    while (page := gateway.ask("GET", f"/v1/videos?limit=100&order=asc{after}").json)["data"]:
        listed |= {video["id"]: video for video in page["data"]}
        after = f"&after={page['last_id']}"
    assert listed.keys() == accepted - deleted
    ends = collections.Counter(video["status"] for video in listed.values())
    codes = {video["error"]["code"] for video in listed.values() if video["status"] == "failed"}
    assert codes <= STABLE
    assert ends.keys() <= {"completed", "failed"}
    assert {job: video["status"] for job, video in seen.items()} == {job: v["status"] for job, v in listed.items()}
    completed = {job for job, video in listed.items() if video["status"] == "completed"}
    assert ends["completed"] > 0.8 * len(listed)
    engine = create_engine(database)
    with engine.connect() as connection:
        ended = dict(
            connection.execute(text("SELECT job, count(*) FROM events WHERE kind = 'completed' GROUP BY job")).all()
        )
        starts = connection.execute(text("SELECT sum(starts) FROM jobs")).scalar()
        gone = connection.execute(text("SELECT count(*) FROM jobs WHERE deleted = 1")).scalar()
        blobs = connection.execute(text("SELECT count(*) FROM blobs")).scalar()
    engine.dispose()
    assert ended == dict.fromkeys(completed, 1)  # none was made twice
    assert (gone, blobs) == (0, 0)
    files = {path.name.partition(".")[0]: path for path in videos.iterdir() if not path.name.startswith(".")}
    assert files.keys() == completed
    contents = {gateway.ask("GET", f"/v1/videos/{job}/content").body for job in completed}
    assert len(contents) == 1  # whole, and the same for everybody
    waits = sorted(wait for client in clients for wait in client.waits)
    return (
        f"{len(accepted)} accepted, {len(deleted)} deleted, {dict(ends)}, {starts} starts, "
        f"median wait {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s"
    )
