"""Jobs as workers see them: claim, report, finish, fail, give back; and what is left of workers that died.

Every write of a worker is conditional on its still holding the job, so a worker whose lease was taken away changes
nothing. Leases are renewed by heartbeats, and taken away only by a gateway that has itself seen the database work for a
whole lease: after an outage everybody gets the time to renew.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, func, insert, or_, select, update

from gateway.database import Database, blobs, events, jobs, keys, models, servers
from gateway.jobs import OPEN, SERVER_SEEN_S, WAITING, failure_values, forget_images, remove_rows
from gateway.served import ServedModel

MOST_STARTS = 10  # of one job, whoever was to blame
FORGOTTEN_S = 7 * 86_400.0  # a server that was not ready for so long is no longer expected
MOST_LOSSES = 2  # servers that may die of a job: the second failure is the client's answer
Result = dict[str, Any]  # file, size_bytes, sha256, event


@dataclass(frozen=True)
class Claim:
    job: RowMapping
    inputs: dict[str, Any]  # of the served model, images included


@dataclass(frozen=True)
class Left:
    """A job whose worker has died."""

    job: RowMapping

    @property
    def result(self) -> Result | None:
        return json.loads(self.job["result"]) if self.job["result"] else None


class Claims:
    """All calls block; each is one transaction.

    Args:
        database: where the jobs are.
        lease_s: seconds without a heartbeat after which a worker counts as dead.
        most_running_of_key: jobs of one key, without a limit of its own, that run at a time.
    """

    def __init__(self, database: Database, lease_s: float, most_running_of_key: int | None = None) -> None:
        self._database, self.lease_s = database, lease_s
        self._most_running = most_running_of_key

    # -- servers

    def saw(self, url: str, model: ServedModel) -> None:
        """Record that the server is ready with this model."""
        with self._database.write() as connection:
            self._database.one_at_a_time(connection)
            now = self._database.now(connection)
            known = connection.execute(update(servers).where(servers.c.url == url).values(model=model.id, seen_at=now))
            if not known.rowcount:
                new = {"url": url, "model": model.id, "holder": "", "lease_until": 0.0, "seen_at": now}
                connection.execute(insert(servers).values(new))
            described = {"description": model.encoded(), "seen_at": now}
            same = update(models).where(models.c.id == model.id).values(described)
            if not connection.execute(same).rowcount:
                connection.execute(insert(models).values(id=model.id, **described))

    def known_models(self) -> dict[str, ServedModel]:
        """The models that servers had when they were last ready, the last one first."""
        with self._database.read() as connection:
            served = servers.join(models, servers.c.model == models.c.id)
            recent = servers.c.seen_at > self._database.now(connection) - FORGOTTEN_S
            asked = select(models.c.description).select_from(served).where(recent).order_by(servers.c.seen_at.desc())
            found = [ServedModel.decoded(text) for text in connection.execute(asked).scalars()]
        return {model.id: model for model in found}

    def ready_servers(self) -> dict[str, int]:
        """The number of servers that were ready just now, by model."""
        with self._database.read() as connection:
            seen = servers.c.seen_at > self._database.now(connection) - SERVER_SEEN_S
            asked = select(servers.c.model, func.count().label("ready")).where(seen).group_by(servers.c.model)
            return {row.model: row.ready for row in connection.execute(asked)}

    def learn(self, model: str, work: float, seconds: float) -> None:
        """Improve the estimate of how long the model's jobs take."""
        with self._database.write() as connection:
            before = connection.execute(select(models.c.seconds_per_work).where(models.c.id == model)).scalar()
            now = seconds / work
            mean = now if before is None else 0.7 * before + 0.3 * now
            connection.execute(update(models).where(models.c.id == model).values(seconds_per_work=mean))

    # -- the life of a claim

    def has_waiting(self, model: str) -> bool:
        with self._database.read() as connection:
            free = select(jobs.c.id).where(WAITING, jobs.c.worker == "", jobs.c.model == model).limit(1)
            return connection.execute(free).first() is not None

    def claim(self, worker: str, url: str, model: str) -> Claim | None:
        """The next job for a free server, leased to ``worker``; None if the server is taken or no job is due."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            free = and_(servers.c.url == url, or_(servers.c.holder == "", servers.c.lease_until < now))
            lease = now + self.lease_s
            if not connection.execute(
                update(servers).where(free).values(holder=worker, lease_until=lease, seen_at=now)
            ).rowcount:
                return None
            job_id = connection.execute(self._next(model)).scalar_one_or_none()
            if job_id is None:
                connection.execute(update(servers).where(servers.c.url == url).values(holder=""))
                return None
            taken = {"worker": worker, "server": url, "lease_until": lease, "starts": jobs.c.starts + 1}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(taken))
            job = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
            images = connection.execute(
                select(blobs.c.name, blobs.c.content).where(blobs.c.job == job_id, blobs.c.name != "preview")
            ).all()
        return Claim(job, json.loads(job["inputs"]) | {name: bytes(content) for name, content in images})

    def _next(self, model: str) -> Any:
        """By priority, then keys with fewer running jobs first, then age."""
        other = jobs.alias()
        running = (
            select(func.count()).where(other.c.key == jobs.c.key, other.c.worker != "", other.c.deleted == 0)
        ).scalar_subquery()
        limit = select(keys.c.most_running).where(keys.c.id == jobs.c.key).scalar_subquery()
        most = func.coalesce(limit, 10**9 if self._most_running is None else self._most_running)
        due = and_(WAITING, jobs.c.worker == "", jobs.c.model == model, running < most)
        asked = select(jobs.c.id).where(due).order_by(jobs.c.priority, running, jobs.c.id).limit(1)
        return self._database.skip_locked(asked, jobs)

    def beat(self, workers: Sequence[str]) -> tuple[set[str], set[str]]:
        """Renew the leases of ``workers``; the ids of their jobs that go on, and of those that have been ended."""
        with self._database.write() as connection:
            lease = self._database.now(connection) + self.lease_s
            connection.execute(update(servers).where(servers.c.holder.in_(workers)).values(lease_until=lease))
            held = jobs.c.worker.in_(workers)
            connection.execute(update(jobs).where(held).values(lease_until=lease))
            rows = connection.execute(select(jobs.c.id, jobs.c.status, jobs.c.deleted).where(held)).all()
        ended = {row.id for row in rows if row.deleted or row.status not in ("queued", "in_progress")}
        return {row.id for row in rows} - ended, ended

    def report(
        self,
        job_id: str,
        worker: str,
        kind: str,
        values: Mapping[str, Any],
        preview: bytes = b"",
        *,
        cached: bool = False,
    ) -> bool:
        """Store progress and its event. False if the worker no longer holds the job, or somebody has ended it.

        ``cached``: a step cache estimated the step, which its event alone says.
        """
        with self._database.write() as connection:
            mine = _held(job_id, worker)
            changed = connection.execute(update(jobs).where(mine, OPEN).values(**values, events=jobs.c.events + 1))
            if not changed.rowcount:
                return False
            _add_event(connection, job_id, kind, cached=cached)
            if preview:
                connection.execute(delete(blobs).where(blobs.c.job == job_id, blobs.c.name == "preview"))
                connection.execute(insert(blobs).values(job=job_id, name="preview", content=preview))
        return True

    def intend(self, job_id: str, worker: str, result: Result) -> bool:
        """Record the file before it gets its name, so that it is found after a kill. False as :meth:`report`."""
        return self.report(job_id, worker, "progress", {"result": json.dumps(result), "phase": "encode"})

    def complete(self, job_id: str, worker: str, expires_s: float | None) -> bool:
        """The file is in its place. False as :meth:`report`; the file is then to be removed."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            expires_at = None if expires_s is None else now + expires_s
            done = {"status": "completed", "progress": 100, "phase": "done", "phase_at": now, "completed_at": now}
            values = {**done, "expires_at": expires_at, "eta_s": None, "worker": "", "events": jobs.c.events + 1}
            if not connection.execute(update(jobs).where(_held(job_id, worker), OPEN).values(values)).rowcount:
                return False
            _add_event(connection, job_id, "completed")
            forget_images(connection, job_id)
        return True

    def fail(self, job_id: str, worker: str, code: str, message: str) -> None:
        with self._database.write() as connection:
            self._fail(connection, job_id, worker, code, message)
            self._let_go(connection, job_id, worker)

    def _fail(self, connection: Connection, job_id: str, worker: str, code: str, message: str) -> None:
        values = failure_values(code, message, self._database.now(connection))
        values |= {"events": jobs.c.events + 1, "result": None}
        if connection.execute(update(jobs).where(_held(job_id, worker), OPEN).values(values)).rowcount:
            _add_event(connection, job_id, "failed")

    def give_back(self, job_id: str, worker: str, *, started: bool, lost: bool, message: str = "") -> None:
        """Put the job back into its place in the queue; or end it, if it has had its tries.

        Args:
            job_id: the job.
            worker: who holds it.
            started: the server had begun it, so this was a try.
            lost: the server died of it, or with it.
            message: why, for the client if this was the last try.
        """
        with self._database.write() as connection:
            job = connection.execute(select(jobs).where(_held(job_id, worker), OPEN)).mappings().one_or_none()
            if job is not None:
                losses = job["losses"] + lost
                if losses >= MOST_LOSSES or job["starts"] >= MOST_STARTS:
                    self._fail(connection, job_id, worker, "engine_lost", message or "its servers ended before it did")
                else:
                    now = self._database.now(connection)
                    again = {"status": "queued", "phase": "queued", "phase_at": now, "losses": losses, "result": None}
                    again |= {"step": None, "eta_s": None, "expert": None, "started_at": None}
                    again["starts"] = job["starts"] - (not started)
                    values = {**again, "events": jobs.c.events + 1}
                    connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
                    _add_event(connection, job_id, "status")
            self._let_go(connection, job_id, worker)

    def let_go(self, job_id: str, worker: str) -> None:
        """End the claim of a job that somebody has ended, after its file was removed."""
        with self._database.write() as connection:
            self._let_go(connection, job_id, worker)

    def _let_go(self, connection: Connection, job_id: str, worker: str) -> None:
        job = connection.execute(select(jobs).where(_held(job_id, worker))).mappings().one_or_none()
        if job is None:
            return
        if job["deleted"]:
            remove_rows(connection, job_id)
            return
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(worker="", lease_until=0.0))
        if job["status"] not in ("queued", "in_progress"):
            forget_images(connection, job_id)

    def free_server(self, url: str, worker: str) -> None:
        with self._database.write() as connection:
            own = and_(servers.c.url == url, servers.c.holder == worker)
            connection.execute(update(servers).where(own).values(holder=""))

    # -- the dead

    def left(self, running: Collection[str] = (), *, at_start: bool = False) -> list[Left]:
        """Jobs whose workers have died: their leases are over, or, ``at_start`` of an only gateway, everybody's.

        ``running`` are the jobs of this process, which goes on with them whatever clocks say.
        """
        seen_s = time.monotonic() - self._database.trouble_at
        if not at_start and seen_s < self.lease_s:
            return []
        with self._database.read() as connection:
            now = self._database.now(connection)
            dead: list[ColumnElement[bool]] = [jobs.c.worker != ""]
            if not at_start:
                dead += [jobs.c.lease_until < now, jobs.c.id.not_in(running)]
            rows = connection.execute(select(jobs).where(*dead)).mappings().all()
            hidden = select(jobs).where(jobs.c.worker == "", jobs.c.deleted == 1)
            rows = [*rows, *connection.execute(hidden).mappings().all()]
        return [Left(row) for row in rows]

    def free_all_servers(self) -> None:
        """At the start of an only gateway: nobody holds a server."""
        with self._database.write() as connection:
            connection.execute(update(servers).values(holder=""))


def _held(job_id: str, worker: str) -> ColumnElement[bool]:
    return and_(jobs.c.id == job_id, jobs.c.worker == worker)


def _add_event(connection: Connection, job_id: str, kind: str, *, cached: bool = False) -> None:
    """The event of a row that has just changed; what a client is told is made from the row, except ``cached``."""
    job = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
    told = ("status", "progress", "phase", "step", "steps", "expert", "eta_s")
    values = {name: job[name] for name in told if job[name] is not None}
    data = json.dumps({**values, "cached": True} if cached else values)
    connection.execute(insert(events).values(job=job_id, number=job["events"], kind=kind, data=data))
