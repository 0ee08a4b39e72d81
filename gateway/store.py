"""Where finished videos are: a folder, or a bucket (S3, Google, Azure) by obstore. A file has the name of its job.

A file of a folder appears under its name whole and on disk, or not at all. What a killed gateway was writing has a
hidden name and is removed by the next sweep.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from wan22.errors import DISK_BROKEN, DISK_FULL, UNWRITABLE, UserError

PART_KEPT_S = 3600.0  # hidden files older than this belong to nobody
STORES = ("s3://", "gs://", "az://")


class StoreError(Exception):
    """The store does not take or give a file. ``code`` is stable, the message may be shown to clients."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Reader(Protocol):
    """An open file. It stays readable while it is open, if the store allows that."""

    size_bytes: int

    def read(self, offset: int, length: int) -> bytes: ...

    def close(self) -> None: ...


class Store(Protocol):
    def put(self, name: str, content: bytes) -> None: ...

    def open(self, name: str) -> Reader | None:
        """None if there is no such file."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def path(self, name: str) -> str | None:
        """The file's path on this machine; None if it is elsewhere."""

    def sizes(self) -> dict[str, int]:
        """The bytes of every file by name; leftovers of killed writers are removed."""


def open_store(place: str) -> Store:
    """The store at ``place``, a folder or the address of a bucket.

    Raises:
        UserError: it cannot be used.
    """
    if not place.startswith(STORES):
        return FolderStore(Path(place))
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
    try:
        store = BucketStore(from_url(place, retry_config=retries))
        store.sizes()
    except (BaseError, ValueError, StoreError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0][:160]
        remedy = "check --videos, and address and credentials in the environment"
        raise UserError(f"videos at {place}: {reason}", "a folder, or a bucket that answers", remedy) from None
    return store


class FolderStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, content: bytes) -> None:
        part = self._folder / f".{name}.{os.getpid()}.part"
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._folder / name)
            _sync_folder(self._folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            code = "storage_full" if error.errno in DISK_FULL else "storage_failed"
            if error.errno in (*DISK_FULL, *DISK_BROKEN, *UNWRITABLE) or isinstance(error, PermissionError):
                raise StoreError(code, "the video could not be stored") from error
            raise

    def open(self, name: str) -> "FileReader | None":
        try:
            return FileReader(os.open(self._folder / name, os.O_RDONLY))
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def path(self, name: str) -> str | None:
        return str((self._folder / name).absolute())

    def sizes(self) -> dict[str, int]:
        found = {}
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if not path.name.startswith("."):
                    found[path.name] = status.st_size
                elif path.suffix == ".part" and time.time() - status.st_mtime > PART_KEPT_S:
                    path.unlink()
        return found


class FileReader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.size_bytes = descriptor, os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def close(self) -> None:
        os.close(self._descriptor)


class BucketStore:
    """Objects of a bucket, or of a prefix in it."""

    def __init__(self, bucket: Any) -> None:
        self._bucket = bucket

    def put(self, name: str, content: bytes) -> None:
        import obstore

        with _as_store_errors():
            obstore.put(self._bucket, name, content)

    def open(self, name: str) -> "ObjectReader | None":
        import obstore

        with _as_store_errors():
            try:
                size_bytes = obstore.head(self._bucket, name)["size"]
            except FileNotFoundError:
                return None
        return ObjectReader(self._bucket, name, size_bytes)

    def path(self, name: str) -> str | None:  # noqa: ARG002
        return None

    def remove(self, name: str) -> None:
        import obstore

        with _as_store_errors(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._bucket, name)

    def sizes(self) -> dict[str, int]:
        import obstore

        with _as_store_errors():
            return {entry["path"]: entry["size"] for page in obstore.list(self._bucket) for entry in page}


class ObjectReader:
    def __init__(self, bucket: Any, name: str, size_bytes: int) -> None:
        self._bucket, self._name, self.size_bytes = bucket, name, size_bytes

    def read(self, offset: int, length: int) -> bytes:
        import obstore

        with _as_store_errors():
            return bytes(obstore.get_range(self._bucket, self._name, start=offset, length=length))

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _as_store_errors() -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        raise StoreError("storage_failed", "the store of videos does not answer") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
