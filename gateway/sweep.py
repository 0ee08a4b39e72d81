"""What is done every few seconds: recover the jobs of dead workers, end what has expired, match files with records."""

import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import and_, delete, select, update

from gateway.claims import Claims, Left
from gateway.database import Database, events, jobs
from gateway.jobs import remove_rows
from gateway.store import Store

log = logging.getLogger("gateway")
STEPS_S = 3600.0  # the events of its steps are kept that long after a job's end
RECORDS_S = 30 * 86_400.0  # and its record
MATCH_EVERY_S = 300.0
UNKNOWN_KEPT_S = 60.0  # a file without a record may be one that is being recorded


@dataclass(frozen=True)
class Keep:
    """How much is kept; None means without limit."""

    seconds: float | None = None
    videos: int | None = None
    total_bytes: int | None = None


class Sweep:
    def __init__(self, database: Database, claims: Claims, store: Store, keep: Keep) -> None:
        self._database, self._claims, self._store, self._keep = database, claims, store, keep
        self._matched_at = 0.0
        self._unknown: dict[str, float] = {}  # files without a record, since when

    def run(self, running: Collection[str]) -> None:
        """``running`` are the jobs of this process."""
        for left in self._claims.left(running):
            self.recover(left)
        self.expire()
        if time.monotonic() - self._matched_at > MATCH_EVERY_S:
            self.match()
            self._forget()
            self._matched_at = time.monotonic()

    def start(self) -> None:
        """Before an only gateway takes requests: everybody who held a job is dead."""
        self._claims.free_all_servers()
        for left in self._claims.left(at_start=True):
            self.recover(left)
        self.match(at_start=True)

    def recover(self, left: Left) -> None:
        """Finish what a dead worker had nearly finished; the rest goes back to the queue, or ends."""
        job, worker, result = left.job, left.job["worker"], left.result
        if job["deleted"]:
            if result is not None:
                self._store.remove(result["file"])
            self._remove(job["id"], worker)
        elif job["status"] not in ("queued", "in_progress"):
            self._claims.let_go(job["id"], worker)
        elif result is not None and self._is_whole(result["file"], result["size_bytes"]):
            self._claims.complete(job["id"], worker, self._keep.seconds)
        elif job["attended"]:
            self._claims.fail(job["id"], worker, "server_shutdown", "the gateway ended while its client waited")
        else:
            started = job["status"] == "in_progress"
            self._claims.give_back(job["id"], worker, started=started, lost=False)
        log.info("recovered job %s", job["id"])

    def _is_whole(self, name: str, size_bytes: int) -> bool:
        """A file has its name only when it is whole; its size is compared all the same."""
        if (reader := self._store.open(name)) is None:
            return False
        try:
            return reader.size_bytes == size_bytes
        finally:
            reader.close()

    def _remove(self, job_id: str, worker: str) -> None:
        with self._database.write() as connection:
            held = and_(jobs.c.id == job_id, jobs.c.worker == worker, jobs.c.deleted == 1)
            if connection.execute(select(jobs.c.id).where(held)).first() is not None:
                remove_rows(connection, job_id)

    def expire(self) -> None:
        """Remove videos that are too old, too many or too large together, oldest first; records go later."""
        with self._database.read() as connection:
            now = self._database.now(connection)
            kept = [jobs.c.status == "completed", jobs.c.result.is_not(None), jobs.c.deleted == 0]
            if self._keep.videos is None and self._keep.total_bytes is None:
                kept.append(jobs.c.expires_at <= now)
            asked = select(jobs.c.id, jobs.c.result, jobs.c.expires_at).where(*kept)
            rows = connection.execute(asked.order_by(jobs.c.completed_at.desc())).all()
        total, gone = 0, []
        for number, (job_id, text, expires_at) in enumerate(rows, 1):
            result = json.loads(text)
            total += result["size_bytes"]
            too_old = expires_at is not None and expires_at <= now
            too_many = self._keep.videos is not None and number > self._keep.videos
            too_large = self._keep.total_bytes is not None and total > self._keep.total_bytes
            if too_old or too_many or too_large:
                gone.append((job_id, result["file"]))
        for job_id, name in gone:
            with self._database.write() as connection:
                values = {"result": None, "expires_at": min(now, self._database.now(connection))}
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            self._store.remove(name)

    def _forget(self) -> None:
        """Remove steps of ended jobs soon, whole records later."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            ended = select(jobs.c.id).where(jobs.c.completed_at < now - STEPS_S)
            connection.execute(delete(events).where(events.c.kind == "progress", events.c.job.in_(ended)))
            old = and_(jobs.c.completed_at < now - RECORDS_S, jobs.c.result.is_(None), jobs.c.worker == "")
            ids = connection.execute(select(jobs.c.id).where(old).limit(1000)).scalars().all()
        for job_id in ids:
            with self._database.write() as connection:
                remove_rows(connection, job_id)

    def match(self, *, at_start: bool = False) -> None:
        """Remove files without a record; end records without a file."""
        sizes = self._store.sizes()
        with self._database.read() as connection:
            rows = connection.execute(select(jobs).where(jobs.c.result.is_not(None))).mappings().all()
        named = {result["file"]: row for row in rows if (result := Left(row).result)}
        now = time.monotonic()
        strangers = {name: self._unknown.get(name, now) for name in sizes.keys() - named.keys()}
        for name, since in strangers.items():
            if at_start or now - since > UNKNOWN_KEPT_S:
                self._store.remove(name)
        self._unknown = strangers
        for name, row in named.items():
            if name not in sizes and row["status"] == "completed" and self._store.open(name) is None:
                lost = {"status": "failed", "error_code": "file_lost", "error_message": "the video's file is gone"}
                with self._database.write() as connection:
                    connection.execute(update(jobs).where(jobs.c.id == row["id"]).values(**lost, result=None))
