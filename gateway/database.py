"""The tables, and transactions on SQLite (one gateway, a file) or PostgreSQL (several gateways).

A write transaction of SQLite takes the database at its start, so that what it reads stays true until it writes. On
PostgreSQL rows are locked where they are claimed. Times are Unix seconds of the database's machine, so that gateways
with different clocks agree about leases.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    select,
    text,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, TimeoutError

from gateway.api_error import ApiError
from wan22.errors import UserError

BUSY_MS = 30_000  # longest wait for another writer of SQLite
POOL = 40  # connections to SQLite; as many as threads that answer requests
POSTGRES_POOL = 20  # of one gateway: PostgreSQL takes 100 from all by default
SILENCE = {  # after which a connection to a database that has vanished counts as lost, in seconds or milliseconds
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}  # fmt: skip
FULL = ("database or disk is full", "No space left on device", "DiskFull")
SQLITE = "gateway.sqlite"  # in the folder of a gateway
MOVED = 1  # SQLite's user_version once another database has the records
tables = MetaData()

jobs = Table(
    "jobs",
    tables,
    Column("id", String(64), primary_key=True),  # in the order of acceptance
    Column("key", String(32), nullable=False),  # whose job it is; empty without keys
    Column("model", String(128), nullable=False),
    Column("status", String(16), nullable=False),  # OpenAI's four
    Column("priority", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("expires_at", Float),
    # what was asked
    Column("inputs", Text, nullable=False),  # JSON, of the served model
    Column("echo", Text, nullable=False),  # JSON, effective values
    Column("work", Float, nullable=False),
    Column("timeout_s", Float),
    Column("media_type", String(32), nullable=False),
    Column("idempotency_key", String(255)),
    Column("body_sha256", String(64), nullable=False),
    Column("attended", Integer, nullable=False),  # 1 if it ends with its client's connection
    # how far it is
    Column("progress", Integer, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("phase_at", Float, nullable=False),
    Column("step", Integer),
    Column("steps", Integer),
    Column("expert", String(32)),
    Column("eta_s", Float),
    Column("events", Integer, nullable=False),  # number of the last event
    # who works on it
    Column("worker", String(64), nullable=False),  # empty if nobody
    Column("server", String(255), nullable=False),  # the last one
    Column("lease_until", Float, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("losses", Integer, nullable=False),  # servers that died of it
    # how it ended
    Column("result", Text),  # JSON: file, size_bytes, sha256; set before the file gets its name
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("deleted", Integer, nullable=False),  # 1: nobody sees it any more; it goes when its worker lets go
    Index("jobs_queue", "status", "worker", "priority", "id"),
    Index("jobs_listed", "key", "id"),
    Index("jobs_idempotent", "key", "idempotency_key", unique=True),
)
blobs = Table(  # images of a job until it has ended, and its last preview
    "blobs",
    tables,
    Column("job", String(64), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
events = Table(
    "events",
    tables,
    Column("job", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("data", Text, nullable=False),
)
keys = Table(
    "keys",
    tables,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("most_waiting", Integer),
    Column("most_running", Integer),
    Column("best_priority", Integer, nullable=False),
)
models = Table(
    "models",
    tables,
    Column("id", String(128), primary_key=True),
    Column("description", Text, nullable=False),
    Column("seconds_per_work", Float),  # of the last jobs
    Column("seen_at", Float, nullable=False),
)
servers = Table(
    "servers",
    tables,
    Column("url", String(255), primary_key=True),
    Column("model", String(128), nullable=False),
    Column("holder", String(64), nullable=False),  # the worker whose job it runs; empty if none
    Column("lease_until", Float, nullable=False),
    Column("seen_at", Float, nullable=False),  # ready
)


class Database:
    """``write`` and ``read`` are transactions; any thread may use them.

    Args:
        url: ``sqlite:///FILE`` or ``postgresql://...``.
        moved: open it also if its records have moved to another database.

    Raises:
        UserError: the address is invalid, the database does not answer, or its records have moved.
    """

    def __init__(self, url: str, moved: bool = False) -> None:
        try:
            address = make_url(url)
        except ArgumentError:
            raise _unusable("not an address") from None
        self.is_postgres = address.get_backend_name() == "postgresql"
        if not self.is_postgres and address.get_backend_name() != "sqlite":
            raise _unusable(address.get_backend_name())
        self.trouble_at = 0.0  # on the monotonic clock: when the database last failed
        if self.is_postgres:
            address = address.set(drivername="postgresql+psycopg")
            limits = {"pool_size": POSTGRES_POOL, "max_overflow": 0, "pool_timeout": 20}
            self.engine = create_engine(address, pool_pre_ping=True, connect_args=SILENCE, **limits)
        else:
            self.engine = create_engine(address, pool_size=POOL, max_overflow=0)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        try:
            with self.engine.begin() as connection:
                if self.is_postgres:  # one gateway at a time makes the tables
                    connection.execute(text("SELECT pg_advisory_xact_lock(20011)"))
                elif not moved and connection.exec_driver_sql("PRAGMA user_version").scalar_one() == MOVED:
                    found = f"{address.database}: its records have moved to another database"
                    raise UserError(found, "a database that runs its jobs alone", "name the other one with --database")
                tables.create_all(connection)
        except DBAPIError as error:
            raise _unusable(str(error.orig).partition("\n")[0]) from None
        self._file = None if self.is_postgres or not address.database else Path(address.database)
        self._number = _file_number(self._file)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may change rows.

        Raises:
            ApiError: 503, the database does not answer, its disk is full, or its file has been removed.
        """
        if self._number != _file_number(self._file):  # what is written now would be gone with this process
            message = "the database's file has been removed or replaced | restart the gateway"
            raise ApiError(503, "database_unavailable", message, retry_after_s=30)
        with self._reported(), self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing. Raises as :meth:`write`."""
        with self._reported(), self.engine.connect() as connection, connection.begin():
            yield connection

    def mark_moved(self) -> None:
        """Let no gateway start on this SQLite database again: another one has its records, and runs its jobs."""
        with self.write() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version = {MOVED}")

    def now(self, connection: Connection) -> float:
        """Unix seconds by the database's clock."""
        if self.is_postgres:
            return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
        return time.time()

    def one_at_a_time(self, connection: Connection) -> None:
        """Let no other gateway past this point until the transaction ends."""
        if self.is_postgres:
            connection.execute(text("SELECT pg_advisory_xact_lock(20012)"))

    def skip_locked(self, statement: Any, of: Table) -> Any:
        """``statement`` with the rows that it finds locked, leaving out those that another gateway has locked."""
        return statement.with_for_update(skip_locked=True, of=of) if self.is_postgres else statement

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise ApiError(503, "database_unavailable", "the database is busy", retry_after_s=5) from error
        except OperationalError as error:
            self.trouble_at = time.monotonic()
            if any(words in str(error.orig) for words in FULL):
                raise ApiError(503, "storage_full", "the disk is full", retry_after_s=30) from error
            raise ApiError(503, "database_unavailable", "the database does not answer", retry_after_s=5) from error
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            self.trouble_at = time.monotonic()
            raise ApiError(503, "database_unavailable", "the database does not answer", retry_after_s=5) from error


def _file_number(path: Path | None) -> int | None:
    """What tells a file from others that had its name; None for none."""
    try:
        return path.stat().st_ino if path else None
    except OSError:
        return None


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder.absolute() / SQLITE}"


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin below, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_MS}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _unusable(found: str) -> UserError:
    expected = "sqlite or a PostgreSQL that answers, as postgresql://user@host/name"
    return UserError(f"database: {found}", expected, "check --database")
