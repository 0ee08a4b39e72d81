"""Move the records of a gateway from SQLite to PostgreSQL; the videos stay where they are."""

from pathlib import Path

from sqlalchemy import func, insert, select

from gateway.database import SQLITE, Database, sqlite_url, tables
from gateway.start import only_one
from wan22.errors import UserError

ROWS = 500  # at a time


def move(data: Path, database: str) -> int:
    """Copy every record of the folder ``data`` to an empty database; the number of records.

    The folder is marked before the copy counts, so no power cut leaves two databases that run the same jobs. A move
    that was interrupted can be made again.

    Raises:
        UserError: a gateway uses the folder, there is nothing in it, or the database is not empty or does not answer.
    """
    if not (data / SQLITE).is_file():
        raise UserError(f"{data} has no {SQLITE}", "the folder of a gateway", "name it with --data")
    with only_one(data, shared=False):
        source, target, moved = Database(sqlite_url(data), moved=True), Database(database), 0
        with source.read() as old, target.write() as new:
            for table in tables.sorted_tables:
                if new.execute(select(func.count()).select_from(table)).scalar_one():
                    raise UserError(f"{table.name} in --database", "an empty database", "make a new one")
                for rows in old.execute(select(table)).mappings().partitions(ROWS):
                    new.execute(insert(table), [dict(row) for row in rows])
                    moved += len(rows)
            source.mark_moved()
    return moved
