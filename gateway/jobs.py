"""Jobs as their clients see them: accept, look up, list, cancel, delete. A key sees its own jobs only."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, func, insert, or_, select, update

from gateway.api_error import ApiError
from gateway.database import Database, blobs, events, jobs, models, servers
from gateway.order import Order

Job = RowMapping  # a row of the table
WAITING = and_(jobs.c.status == "queued", jobs.c.deleted == 0)
OPEN = and_(jobs.c.status.in_(("queued", "in_progress")), jobs.c.deleted == 0)
GUESSED_JOB_S = 60.0  # before the first job of a model has ended
SERVER_SEEN_S = 15.0  # a server is counted while a worker has seen it ready since


@dataclass(frozen=True)
class Key:
    """Who asks. Without keys everybody is the key with the empty name."""

    id: str = ""
    most_waiting: int | None = None
    best_priority: int = 1


@dataclass(frozen=True)
class Accepted:
    job: Job
    is_new: bool  # False for a repeated request with the same Idempotency-Key


@dataclass(frozen=True)
class Wait:
    """What a waiting job waits for."""

    position: int  # 1 is next
    eta_s: float | None  # until its video is there


class Jobs:
    """All calls block; each is one transaction.

    Args:
        database: where they are.
        most_waiting: jobs that wait, of all keys.
        most_waiting_of_key: of one key without a limit of its own.
    """

    def __init__(self, database: Database, most_waiting: int, most_waiting_of_key: int | None = None) -> None:
        self._database = database
        self._most, self._most_of_key = most_waiting, most_waiting_of_key

    def repeated(self, key: Key, idempotency_key: str, body_sha256: str) -> Job | None:
        """The job of an earlier request with this Idempotency-Key. Raises ApiError if its body was another."""
        with self._database.read() as connection:
            return self._repeated(connection, key, idempotency_key, body_sha256)

    def add(
        self,
        order: Order,
        key: Key,
        body_sha256: str,
        idempotency_key: str | None = None,
        *,
        attended: bool = False,
    ) -> Accepted:
        """Write the job down. It is accepted, and found by workers, when this returns.

        Raises:
            ApiError: the queue is full, or see :meth:`repeated`.
        """
        with self._database.write() as connection:
            self._database.one_at_a_time(connection)
            if idempotency_key is not None:
                job = self._repeated(connection, key, idempotency_key, body_sha256)
                if job is not None:
                    return Accepted(job, is_new=False)
            self._check_room(connection, order, key)
            now = self._database.now(connection)
            values: dict[str, Any] = {
                "id": f"video_{time.time_ns():016x}{secrets.token_hex(8)}",
                "key": key.id,
                "model": order.model,
                "status": "queued",
                "priority": max(order.priority, key.best_priority),
                "created_at": now,
                "inputs": json.dumps(order.inputs),
                "echo": json.dumps({**order.echo, "priority": max(order.priority, key.best_priority)}),
                "work": order.work,
                "timeout_s": order.timeout_s,
                "media_type": order.media_type,
                "idempotency_key": idempotency_key,
                "body_sha256": body_sha256,
                "attended": int(attended),
                **{"progress": 0, "phase": "queued", "phase_at": now, "events": 0, "worker": "", "server": ""},
                **{"lease_until": 0.0, "starts": 0, "losses": 0, "deleted": 0},
            }
            connection.execute(insert(jobs).values(values))
            for name, content in order.images.items():
                connection.execute(insert(blobs).values(job=values["id"], name=name, content=content))
            job = connection.execute(select(jobs).where(jobs.c.id == values["id"])).mappings().one()
        return Accepted(job, is_new=True)

    def _repeated(self, connection: Connection, key: Key, idempotency_key: str, body_sha256: str) -> Job | None:
        same = and_(jobs.c.key == key.id, jobs.c.idempotency_key == idempotency_key, jobs.c.deleted == 0)
        job = connection.execute(select(jobs).where(same)).mappings().one_or_none()
        if job is not None and job["body_sha256"] != body_sha256:
            message = "this Idempotency-Key came with another request before | expected a key for each request"
            raise ApiError(409, "idempotency_key_reused", message)
        return job

    def check_room(self, order: Order, key: Key) -> None:
        """Raises ApiError if the queue is full."""
        with self._database.read() as connection:
            self._check_room(connection, order, key)

    def _check_room(self, connection: Connection, order: Order, key: Key) -> None:
        waiting = connection.execute(select(func.count()).where(WAITING, jobs.c.worker == "")).scalar_one()
        if waiting >= self._most:
            wait_s = self._job_s(connection, order.model, order.work)
            raise ApiError(429, "queue_full", f"{waiting} jobs wait already | try again later", retry_after_s=wait_s)
        most = key.most_waiting if key.most_waiting is not None else self._most_of_key
        if most is not None:
            own = select(func.count()).where(WAITING, jobs.c.worker == "", jobs.c.key == key.id)
            if (waiting := connection.execute(own).scalar_one()) >= most:
                wait_s = self._job_s(connection, order.model, order.work)
                message = f"{waiting} jobs of this key wait already | try again later"
                raise ApiError(429, "key_limit_reached", message, retry_after_s=wait_s)

    def _job_s(self, connection: Connection, model: str, work: float) -> float:
        """Seconds until a place in the queue should be free: a job of that work on each server."""
        seconds = connection.execute(select(models.c.seconds_per_work).where(models.c.id == model)).scalar()
        ready = self._ready(connection, model)
        return (seconds * work if seconds else GUESSED_JOB_S) / max(1, ready)

    def _ready(self, connection: Connection, model: str) -> int:
        seen = servers.c.seen_at > self._database.now(connection) - SERVER_SEEN_S
        return connection.execute(select(func.count()).where(servers.c.model == model, seen)).scalar_one()

    # -- look up

    def get(self, job_id: str, key: Key) -> Job | None:
        with self._database.read() as connection:
            return connection.execute(select(jobs).where(_own(job_id, key))).mappings().one_or_none()

    def wait(self, job: Job) -> Wait:
        """The place of a waiting job in the queue, and when its video should be there."""
        first = or_(jobs.c.priority < job["priority"], and_(jobs.c.priority == job["priority"], jobs.c.id < job["id"]))
        of_model = and_(WAITING, jobs.c.model == job["model"])
        ahead = select(func.count(), func.coalesce(func.sum(jobs.c.work), 0)).where(of_model, first)
        running = select(func.coalesce(func.sum(jobs.c.work * (100 - jobs.c.progress) / 100), 0)).where(
            jobs.c.status == "in_progress", jobs.c.model == job["model"]
        )
        with self._database.read() as connection:
            count, work = connection.execute(ahead).one()
            work += connection.execute(running).scalar_one()
            per_work = connection.execute(select(models.c.seconds_per_work).where(models.c.id == job["model"])).scalar()
            ready = self._ready(connection, job["model"])
        eta_s = None if per_work is None or not ready else per_work * (work / ready + job["work"])
        return Wait(count + 1, eta_s)

    def page(self, key: Key, after: str | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """Up to ``limit`` jobs beyond ``after``, and whether there are more."""
        beyond: list[ColumnElement[bool]] = []
        if after is not None:
            beyond.append(jobs.c.id > after if order == "asc" else jobs.c.id < after)
        by = jobs.c.id.asc() if order == "asc" else jobs.c.id.desc()
        with self._database.read() as connection:
            asked = select(jobs).where(jobs.c.key == key.id, jobs.c.deleted == 0, *beyond).order_by(by).limit(limit + 1)
            rows = connection.execute(asked).mappings().all()
        return list(rows[:limit]), len(rows) > limit

    def preview(self, job_id: str) -> bytes | None:
        with self._database.read() as connection:
            found = select(blobs.c.content).where(blobs.c.job == job_id, blobs.c.name == "preview")
            return connection.execute(found).scalar_one_or_none()

    def events_after(self, job_id: str, number: int) -> Sequence[RowMapping]:
        with self._database.read() as connection:
            later = select(events).where(events.c.job == job_id, events.c.number > number).order_by(events.c.number)
            return connection.execute(later).mappings().all()

    # -- end

    def cancel(self, job_id: str, key: Key) -> Job | None:
        """End an unfinished job as failed with the code ``cancelled``; its worker is to be told. None without a job."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            values = failure_values("cancelled", "the job was cancelled", now)
            connection.execute(update(jobs).where(_own(job_id, key), OPEN).values(values))
            job = connection.execute(select(jobs).where(_own(job_id, key))).mappings().one_or_none()
            if job is not None and not job["worker"]:
                forget_images(connection, job_id)
        return job

    def delete(self, job_id: str, key: Key) -> Job | None:
        """Hide the job from everybody, as it was before; None without a job. What it left is still to be removed."""
        with self._database.write() as connection:
            job = connection.execute(select(jobs).where(_own(job_id, key))).mappings().one_or_none()
            if job is not None:
                gone = {"deleted": 1, "idempotency_key": None}
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(gone))
        return job

    def is_held(self, job_id: str) -> bool:
        """True while a worker works on the job, deleted or not."""
        with self._database.read() as connection:
            worker = connection.execute(select(jobs.c.worker).where(jobs.c.id == job_id)).scalar_one_or_none()
        return bool(worker)

    def remove(self, job_id: str) -> None:
        """Remove the row of a deleted job that nobody works on, after its file."""
        with self._database.write() as connection:
            free = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.deleted == 1, jobs.c.worker == "")
            if connection.execute(free).scalar_one_or_none() is not None:
                remove_rows(connection, job_id)

    def counts(self) -> Mapping[tuple[str, str], int]:
        """The number of jobs by model and status."""
        with self._database.read() as connection:
            asked = select(jobs.c.model, jobs.c.status, func.count()).where(jobs.c.deleted == 0)
            return {(m, s): n for m, s, n in connection.execute(asked.group_by(jobs.c.model, jobs.c.status))}

    def stored_bytes(self) -> int:
        with self._database.read() as connection:
            kept = select(jobs.c.result).where(jobs.c.result.is_not(None), jobs.c.status == "completed")
            return sum(json.loads(text)["size_bytes"] for text in connection.execute(kept).scalars())


def _own(job_id: str, key: Key) -> ColumnElement[bool]:
    return and_(jobs.c.id == job_id, jobs.c.key == key.id, jobs.c.deleted == 0)


def failure_values(code: str, message: str, now: float) -> dict[str, Any]:
    return {
        "status": "failed",
        "phase": "done",
        "phase_at": now,
        "completed_at": now,
        "error_code": code,
        "error_message": message,
        "eta_s": None,
    }


def forget_images(connection: Connection, job_id: str) -> None:
    connection.execute(delete(blobs).where(blobs.c.job == job_id, blobs.c.name != "preview"))


def remove_rows(connection: Connection, job_id: str) -> None:
    for table, column in ((blobs, blobs.c.job), (events, events.c.job), (jobs, jobs.c.id)):
        connection.execute(delete(table).where(column == job_id))
