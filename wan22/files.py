"""Write files and folders atomically: after any failure an output is complete or absent.

Commands write their output into a hidden folder next to its final place::

    out/.engines.partial/
        wan-trt.lock        locked by the writing process, until it ends
        engines             the unfinished file or folder
        wan-trt.earlier/    the output to replace, on file systems that cannot exchange two names

At the end the output is synced and renamed in one step, then its parent folder is synced: after a crash or a power cut
the name belongs to the old content or to the new. A second process is refused while the lock is held. A hidden folder
without a lock is left over from a killed process; the next claim of the same output or :func:`remove_leftovers` removes
it.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from wan22.errors import UserError, deferred_interrupts, refusing_disk_errors
from wan22.renames import EARLIER, exchange, put_back, sync, sync_tree

LOCK, SUFFIX = "wan-trt.lock", ".partial"
SCRATCH = "wan-trt-"  # prefix of the temporary folders of a running process
NAME_MAX_BYTES = 255


@dataclass
class Claim:
    """The hidden folder of one output. This process alone uses it and removes it at the end."""

    output: Path
    folder: Path
    keep: bool = False  # leave the folder for the next claim of the same output

    @property
    def new(self) -> Path:
        """The path to write; it becomes the output and does not exist at first."""
        return self.folder / self.output.name

    def publish(self) -> None:
        """Sync ``new`` and give it its final name, replacing an earlier output in one step."""
        sync_tree(self.new)
        try:
            if self.new.is_dir() and self.output.is_dir() and any(self.output.iterdir()):
                exchange(self.new, self.output, self.folder)
            else:
                self.new.replace(self.output)
        except OSError as error:
            expected = "a name that it can take"
            raise UserError(f"cannot write {self.output}: {error.strerror}", expected, "choose another") from error
        sync(self.output.parent)


def hidden_folder(output: Path) -> Path:
    """The hidden folder for ``output``. A name too long for the prefix is cut and gets a hash."""
    name = f".{output.name}{SUFFIX}"
    if len(os.fsencode(name)) > NAME_MAX_BYTES:
        digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:16]
        name = f".{output.name.encode(errors='replace')[:200].decode(errors='ignore')}-{digest}{SUFFIX}"
    return output.absolute().parent / name


@contextmanager
def claim(
    output: Path, what: str = "", *, resume: bool = False, make_folder: bool = True, wait: bool = False
) -> Iterator[Claim]:
    """Reserve ``output`` for this process until the block ends.

    Args:
        output: a file or folder, which may exist.
        what: its name in errors, such as "report".
        resume: keep the content that an earlier claim left in the hidden folder instead of deleting it.
        make_folder: create the parent folder; it is removed again if the block fails.
        wait: wait while another process writes it, for files that several commands share.

    Raises:
        UserError: the path is not usable, another process writes it, the disk is full, read-only or broken.
    """
    named, output = f"{what} {output}" if what else str(output), output.absolute()
    _check_name(output, named, make_folder=make_folder)
    claimed = Claim(output, hidden_folder(output))
    with ExitStack() as stack:
        try:
            with nullcontext() if wait else deferred_interrupts():
                stack.enter_context(_parents(output.parent))
                stack.callback(os.close, _acquire_lock(claimed.folder, named, wait=wait))
                stack.callback(_release, claimed)
            put_back(claimed.folder)
            if not resume:
                _empty(claimed.folder)
        except OSError as error:
            found = f"cannot write {named}: {error.strerror}"
            raise UserError(found, "a place that can be written", "choose another") from error
        with refusing_disk_errors(named, lambda: f" to go on, or delete {claimed.folder}" if claimed.keep else ""):
            yield claimed


@contextmanager
def whole_file(path: Path, what: str = "", *, make_folder: bool = True, wait: bool = False) -> Iterator[Path]:
    """Yield the path to write; the file there becomes ``path`` if the block succeeds, replacing an earlier file.

    The block may put temporary files of other names next to it. Raises as :func:`claim`.
    """
    with claim_file(path, what, make_folder=make_folder, wait=wait) as claimed:
        yield claimed.new
        claimed.publish()


def claim_file(
    path: Path, what: str = "", *, make_folder: bool = True, wait: bool = False
) -> AbstractContextManager[Claim]:
    """:func:`claim` for a file that is published once or repeatedly; raises UserError also for a folder."""
    with refusing_disk_errors(f"{what} {path}".strip()):
        if path.is_dir():
            raise UserError(f"{what} {path}: a folder".strip(), "the name of a file", "name one in it")
    return claim(path, what, make_folder=make_folder, wait=wait)


@contextmanager
def whole_folder(folder: Path, replaces: str = "") -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` if the block succeeds; arguments as :func:`check_room`."""
    check_room(folder, replaces)
    with claim(folder) as claimed:
        claimed.new.mkdir()
        yield claimed.new
        claimed.publish()


def write_file(path: Path, content: bytes, what: str = "", *, wait: bool = False) -> None:
    """Write one file. Raises as :func:`claim`."""
    with whole_file(path, what, wait=wait) as new:
        new.write_bytes(content)


def write_files(claimed: Claim, contents: Mapping[str, Callable[[], bytes]]) -> None:
    """Write files by name into the folder of the claimed output, each atomically and independently of the others.

    Raises:
        Exception: the first failure of a content or the disk, after all other files are written.
    """
    failed: list[Exception] = []
    for name, content in contents.items():
        target = Claim(claimed.output.with_name(name), claimed.folder)
        try:
            with refusing_disk_errors(str(target.output)):
                target.new.write_bytes(content())
                target.publish()
        except Exception as error:
            failed.append(error)
    if failed:
        raise failed[0]


def check_room(folder: Path, replaces: str = "") -> None:
    """Refuse a folder that a new one cannot replace.

    Args:
        folder: the folder to write, which may exist.
        replaces: a file that identifies an earlier result, which may be replaced; "" means nothing may be.

    Raises:
        UserError: the folder has other content, or the path is a link, a mount point or a file.
    """
    with refusing_disk_errors(str(folder)):
        here = folder.exists() and folder.samefile(Path())
        if here or folder.is_symlink() or folder.is_mount():
            kind = "the working folder" if here else "a link" if folder.is_symlink() else "a mount point"
            expected = "a folder that can be replaced at the end"
            raise UserError(f"{folder} is {kind}", expected, "name one inside it")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        if not replaces:
            raise UserError(f"{folder} exists", "a new folder", "choose another or add --overwrite")
        if not (folder / replaces).is_file():
            raise UserError(f"{folder} has no {replaces}", "an earlier result to overwrite", "choose another folder")


# -- hidden folders


def _check_name(output: Path, named: str, *, make_folder: bool) -> None:
    if output.name in ("", "-", "..", LOCK, EARLIER):
        raise UserError(f"cannot write {named}", "the name of a file or folder", "choose another")
    with refusing_disk_errors(named):
        if not make_folder and not output.parent.is_dir():
            raise UserError(f"{named}: no such folder", "an existing folder", "make it first")
        ordinary = not output.exists() or output.is_file() or output.is_dir()
        if not ordinary or output.parent == Path("/dev"):
            raise UserError(f"{named} is a device", "the name of a file or folder", "choose another")


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents; if the block fails, remove those that are new and empty."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def _acquire_lock(folder: Path, named: str, *, wait: bool) -> int:
    """Create the hidden ``folder`` and return the descriptor that holds its lock."""
    while True:
        with suppress(FileExistsError):  # not exist_ok, which raises if another process removes it at that moment
            folder.mkdir()
        with suppress(FileNotFoundError):
            if LOCK not in (names := [path.name for path in folder.iterdir()]) and names:
                raise UserError(f"{folder} is in the way", f"a name free for {named} while it is made", "rename it")
        if (lock := _try_lock(folder, wait=wait)) is not None:
            return lock
        if not wait and (folder / LOCK).exists():
            raise UserError(f"another process writes {named}", "one at a time", "wait for it or choose another")


def _try_lock(folder: Path, *, wait: bool) -> int | None:
    """The descriptor with the lock; None while another process holds it, or if the folder was removed meanwhile."""
    with suppress(FileNotFoundError, BlockingIOError), ExitStack() as stack:
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            with suppress(OSError):
                folder.rmdir()  # which may have been made a moment ago
            raise
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
            stack.pop_all()
            return descriptor
    return None


def _empty(folder: Path) -> None:
    for each in folder.iterdir():
        if each.name != LOCK:
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def _release(claimed: Claim) -> None:
    """Remove the hidden folder, whose lock this process holds. The next claim removes anything left."""
    with deferred_interrupts(), suppress(OSError):
        if not claimed.keep:
            put_back(claimed.folder)
            _empty(claimed.folder)
            (claimed.folder / LOCK).unlink()
            claimed.folder.rmdir()


# -- leftovers of killed processes


@contextmanager
def scratch_folder(use: str) -> Iterator[Path]:
    """An empty folder for temporary files; leftovers of killed processes with the same ``use`` are removed first."""
    place = Path(tempfile.gettempdir())
    for folder in place.glob(f"{SCRATCH}{use}-*{SUFFIX}"):
        _remove_if_dead(folder)
    with ExitStack() as stack:
        with deferred_interrupts():
            folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{use}-", suffix=SUFFIX))
            stack.callback(os.close, _acquire_lock(folder, str(folder), wait=False))
            stack.callback(_release, Claim(folder, folder))
        with refusing_disk_errors(str(folder)):
            yield folder


def remove_leftovers(place: Path) -> dict[Path, int]:
    """Remove the hidden folders in ``place`` and the temporary ones of dead processes; return folder → bytes."""
    found = [*place.glob(f".*{SUFFIX}"), *Path(tempfile.gettempdir()).glob(f"{SCRATCH}*{SUFFIX}")]
    return {folder: size for folder in sorted(found) if (size := _remove_if_dead(folder)) is not None}


def _remove_if_dead(folder: Path) -> int | None:
    """Remove ``folder`` and return its bytes; None if another process uses it or another program created it."""
    try:
        if not any(folder.iterdir()):  # its process died before it had the lock
            folder.rmdir()
            return 0
        ours = (folder / LOCK).is_file() and folder.lstat().st_uid == os.getuid()
        if not ours or (lock := _try_lock(folder, wait=False)) is None:
            return None
    except OSError:  # another user's
        return None
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    _release(Claim(folder, folder))
    os.close(lock)
    return None if folder.exists() else size
