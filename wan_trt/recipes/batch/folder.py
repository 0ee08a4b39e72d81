"""The output of a batch: videos and ``results.jsonl`` in a folder, or under a URL of fsspec."""

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

import msgspec

from wan22.bundle import sha256_of
from wan22.errors import DAMAGED_JSON, UserError
from wan22.files import claim, hidden_folder, write_file

RESULTS = "results.jsonl"


class Named(Protocol):
    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


class Folder(Generic[R]):
    """Results by the name of their job, and the files beside them. The last line of a name counts."""

    results: dict[str, R]

    @staticmethod
    @contextmanager
    def opened(output: str, kind: type[R]) -> "Iterator[Folder[R]]":
        """The folder ``output``, created if it is not there, for this process alone.

        Raises:
            UserError: it holds other things than a batch, another process writes it, or it cannot be used.
        """
        if "://" in (output := output.removeprefix("file://")):
            yield _Remote(output, kind)
            return
        folder = Path(output)
        claimed = hidden_folder((folder / RESULTS).absolute())  # another process's, or left by a killed one
        if folder.is_dir() and set(folder.absolute().iterdir()) - {claimed} and not (folder / RESULTS).is_file():
            raise UserError(f"{folder} holds other files", "an empty folder, or that of a batch", "name another")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file", "a folder", "name another")
        with claim(folder / RESULTS):
            yield _Local(folder, kind)

    def has(self, name: str, sha256: str) -> bool:
        """Whether there is a file ``name``, and in a folder of this machine whether it has that hash."""
        raise NotImplementedError

    def write(self, name: str, content: bytes) -> None:
        """Write the file ``name``, whole or not at all."""
        raise NotImplementedError

    def add(self, result: R) -> None:
        """Append a result."""
        raise NotImplementedError


def _results(content: bytes, kind: type[R]) -> tuple[dict[str, R], bytes]:
    """The results by name, and the whole lines: a killed process may have left part of one."""
    whole = content[: content.rfind(b"\n") + 1]
    try:
        found = [msgspec.json.decode(line, type=kind) for line in whole.splitlines()]
    except DAMAGED_JSON as error:
        raise UserError(f"{RESULTS}: {error}", "lines written by wan-trt batch", "use another folder") from None
    return {result.name: result for result in found}, whole


class _Local(Folder[R]):
    def __init__(self, folder: Path, kind: type[R]) -> None:
        self._folder, self._path = folder, folder / RESULTS
        self.results, whole = _results(self._path.read_bytes() if self._path.exists() else b"", kind)
        with self._path.open("ab") as lines:
            lines.truncate(len(whole))

    def has(self, name: str, sha256: str) -> bool:
        path = self._folder / name
        return path.is_file() and sha256_of(path) == sha256

    def write(self, name: str, content: bytes) -> None:
        write_file(self._folder / name, content)

    def add(self, result: R) -> None:
        with self._path.open("ab") as lines:
            lines.write(msgspec.json.encode(result) + b"\n")
            _sync(lines)
        self.results[result.name] = result


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Remote(Folder[R]):
    """Object stores replace whole objects, and do not append: every result rewrites ``results.jsonl``."""

    def __init__(self, url: str, kind: type[R]) -> None:
        import fsspec

        self._url = url
        try:
            files, self._root = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{url}: {error}", "a folder or a URL that fsspec opens", "install its package") from None
        self._files: Any = files
        path = self._at(RESULTS)
        with self._refusing():
            self._files.makedirs(self._root, exist_ok=True)
            content = self._files.cat_file(path) if self._files.exists(path) else b""
        self.results, self._lines = _results(content, kind)

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Whatever a store raises, and each has errors of its own, is one line."""
        try:
            yield
        except Exception as error:
            found = f"{self._url}: {type(error).__name__}: {error}"
            raise UserError(found, "a store that answers and can be written", "see its address and keys") from error

    def has(self, name: str, sha256: str) -> bool:  # noqa: ARG002 - hashing it would download it
        with self._refusing():
            return bool(self._files.exists(self._at(name)))

    def write(self, name: str, content: bytes) -> None:
        with self._refusing():
            self._files.pipe_file(self._at(name), content)

    def add(self, result: R) -> None:
        self._lines += msgspec.json.encode(result) + b"\n"
        self.write(RESULTS, self._lines)
        self.results[result.name] = result
