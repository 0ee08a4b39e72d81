"""Files and folders are whole or not there, whoever else writes them and whatever ends the process or the disk."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from wan22 import files, renames
from wan22.errors import UserError, refusing_disk_errors
from wan22.files import (
    claim,
    hidden_folder,
    remove_leftovers,
    scratch_folder,
    whole_file,
    whole_folder,
    write_file,
    write_files,
)

FORK = multiprocessing.get_context("fork")
MARK = "mark"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def made(folder, content):
    """``folder`` with a mark that says what it holds."""
    folder.mkdir()
    (folder / MARK).write_text(content)
    return folder


@pytest.fixture
def killed():
    """``killed(work)``: ``work()`` in a process that it ends with SIGKILL."""

    def run(work):
        process = FORK.Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return run


def kill_me(*_args):
    os.kill(os.getpid(), signal.SIGKILL)


# -- whole or not there


def test_a_file_that_was_left_half_way_leaves_the_earlier_one(tmp_path):
    (tmp_path / "x").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_a_file_that_cannot_take_its_place_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: a folder"), whole_file(tmp_path / "folder"):
        raise AssertionError("it was begun")
    assert names(tmp_path) == ["folder"]


def test_a_whole_file_takes_the_place_of_the_earlier_one(tmp_path):
    (tmp_path / "x").write_text("earlier")
    with whole_file(tmp_path / "x") as partial:
        partial.write_text("later")
        assert (tmp_path / "x").read_text() == "earlier"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["later"]


@pytest.mark.parametrize("swap", [None, errno.EINVAL, errno.ENOSYS])
def test_a_folder_is_exchanged_for_the_earlier_one(tmp_path, monkeypatch, swap):
    """Also on a file system that cannot swap two names."""
    if swap:
        monkeypatch.setattr(renames, "_swap", lambda *_: (_ for _ in ()).throw(OSError(swap, os.strerror(swap))))
    old = made(tmp_path / "x", "old")
    with whole_folder(old, MARK) as new:
        (new / MARK).write_text("new")
    assert (old / MARK).read_text() == "new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("failing", ["swap", "first rename", "second rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EXDEV])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, failing, number):
    calls = iter(("first rename", "second rename"))
    rename = Path.rename

    def fails(self, target):
        if next(calls, "") == failing:
            raise OSError(number, os.strerror(number))
        return rename(self, target)

    def swap(*_):
        raise OSError(number if failing == "swap" else errno.EINVAL, "no swap")

    monkeypatch.setattr(renames, "_swap", swap)
    monkeypatch.setattr(Path, "rename", fails)
    old = made(tmp_path / "x", "old")
    with pytest.raises(UserError, match="cannot write"), whole_folder(old, MARK) as new:
        (new / MARK).write_text("new")
    assert (old / MARK).read_text() == "old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("again", ["the same output", "clean"])
def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path, monkeypatch, killed, again):
    old, rename = made(tmp_path / "x", "old"), Path.rename

    def dies(self, target):
        if self.parent.name.endswith(files.SUFFIX):  # the new one's turn
            kill_me()
        return rename(self, target)

    def overwrite():
        renames._swap = lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "no swap"))
        Path.rename = dies
        with whole_folder(old, MARK) as new:
            (new / MARK).write_text("new")

    killed(overwrite)
    assert not old.exists()
    if again == "clean":
        remove_leftovers(tmp_path)
    else:
        with pytest.raises(UserError, match="exists"), claim(old):
            files.check_room(old)
    assert (old / MARK).read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_everything_is_synced_before_its_rename_and_the_folder_around_it_after(tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def replaced(self, target):
        seen.append("renamed")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with whole_folder(tmp_path / "x") as new:
        (new / "deep").mkdir()
        (new / "deep" / "file").touch()
    before, after = seen[: seen.index("renamed")], seen[seen.index("renamed") + 1 :]
    assert before == [new / "deep" / "file", new / "deep", new]
    assert after == [tmp_path]


def test_what_cannot_be_made_does_not_keep_the_others_from_being_written(tmp_path):
    def fails():
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"), claim(tmp_path / "a") as claimed:
        write_files(claimed, {"a": fails, "b": lambda: b"b", "c": lambda: b"c"})
    assert names(tmp_path) == ["b", "c"]


# -- two writers


@pytest.mark.parametrize("writer", [whole_file, whole_folder, claim])
def test_the_second_writer_is_refused_in_one_line(tmp_path, writer):
    """The lock is a process's, so the first writer is another process, which holds it until it is asked to end."""
    begun, end = FORK.Event(), FORK.Event()

    def first():
        with claim(tmp_path / "x") as claimed:
            claimed.new.write_text("first")
            begun.set()
            end.wait(60)
            claimed.publish()

    process = FORK.Process(target=first)
    process.start()
    assert begun.wait(60)
    told = r"another process writes .*x .* wait for it or choose another"
    with pytest.raises(UserError, match=told), writer(tmp_path / "x"):
        raise AssertionError("it was begun")
    assert remove_leftovers(tmp_path) == {}
    end.set()
    process.join(60)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_a_file_that_commands_share_is_waited_for(tmp_path):
    begun = FORK.Event()

    def first():
        with claim(tmp_path / "x") as claimed:
            begun.set()
            claimed.new.write_text("first")
            claimed.publish()

    process = FORK.Process(target=first)
    process.start()
    assert begun.wait(60)
    write_file(tmp_path / "x", b"second", wait=True)
    process.join(60)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["second"]


def test_many_writers_at_once_leave_one_whole_file_and_no_error(tmp_path):
    def write(number):
        for _ in range(20):
            write_file(tmp_path / "x", bytes([number]) * 100_000, wait=True)

    processes = [FORK.Process(target=write, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert names(tmp_path) == ["x"]
    assert len(set((tmp_path / "x").read_bytes())) == 1


# -- what killed processes leave


@pytest.mark.parametrize("again", ["the same output", "clean"])
def test_what_a_killed_process_left_is_removed(tmp_path, killed, again):
    def dies():
        with whole_folder(tmp_path / "x") as new:
            (new / "half").write_bytes(b"1234")
            kill_me()

    killed(dies)
    assert names(tmp_path) == [".x.partial"]
    if again == "clean":
        assert remove_leftovers(tmp_path) == {tmp_path / ".x.partial": 4}
        assert names(tmp_path) == []
    else:
        with whole_folder(tmp_path / "x") as new:
            assert names(new) == []
        assert names(tmp_path) == ["x"]


def test_what_is_not_ours_is_not_removed(tmp_path):
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "photo").touch()
    assert remove_leftovers(tmp_path) == {}
    with pytest.raises(UserError, match=r"\.x\.partial is in the way"), whole_file(tmp_path / "x"):
        raise AssertionError("it was begun")
    assert names(tmp_path / ".x.partial") == ["photo"]


def test_temporary_folders_of_killed_processes_are_removed(tmp_path, monkeypatch, killed):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def dies():
        with scratch_folder("test") as folder:
            (folder / "big").write_bytes(b"x")
            kill_me()

    killed(dies)
    (left,) = names(tmp_path)
    with scratch_folder("another"), scratch_folder("test") as mine, scratch_folder("test"):
        assert left not in names(tmp_path)
        assert mine.exists()
        assert len(names(tmp_path)) == 3
    assert names(tmp_path) == []
    killed(dies)
    assert len(remove_leftovers(tmp_path / "nowhere")) == 1
    assert names(tmp_path) == []


def test_folders_that_had_to_be_made_go_with_what_failed(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    write_file(tmp_path / "a" / "b" / "c", b"x")
    assert names(tmp_path / "a" / "b") == ["c"]


# -- names


@pytest.mark.parametrize("name", ["[/x].mp4", "[bold]cat", "x" * 255, "猫" * 85, " ", "a\nb", "*?", "-x"])
def test_every_name_of_a_file_works(tmp_path, name):
    write_file(tmp_path / name, b"x")
    assert names(tmp_path) == [Path(name).parts[0]]
    assert (tmp_path / name).read_bytes() == b"x"


def test_long_names_that_begin_alike_have_folders_of_their_own(tmp_path):
    one, other = (hidden_folder(tmp_path / f"{'x' * 254}{end}") for end in "ab")
    assert one != other
    assert max(len(os.fsencode(each.name)) for each in (one, other)) <= 255


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("-", "cannot write -"),
        ("..", "cannot write .."),
        ("/", "cannot write /"),
        ("/proc/a.mp4", "cannot write /proc/a.mp4: No such file"),
        ("/dev/null", "/dev/null is a device"),
        ("/dev/new", "/dev/new is a device"),
        ("file/x", "cannot write file/x: Not a directory"),
        ("fifo", "fifo is a device"),
        ("x" * 256, "File name too long"),
        ("wan-trt.lock", "cannot write wan-trt.lock"),
    ],
)
def test_what_can_be_no_output_is_refused_before_the_work(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    os.mkfifo("fifo")
    with pytest.raises(UserError) as refused, claim(Path(name)):
        raise AssertionError("it was begun")
    assert found in refused.value.found
    assert names(tmp_path) == ["fifo", "file"]


def test_a_folder_to_be_made_first_is_named(tmp_path):
    place = claim(tmp_path / "no" / "x.png", "plot", make_folder=False)
    with pytest.raises(UserError, match=r"plot .*no/x\.png: no such folder"), place:
        raise AssertionError("it was begun")


# -- errors of the disk


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "disk full while writing x | expected free space | free some and run again"),
        (errno.EDQUOT, "disk full while writing x | expected free space | free some and run again"),
        (
            errno.EIO,
            "Input/output error while writing x | expected a working disk | see the system's log and run again",
        ),
        (errno.ENAMETOOLONG, "x: File name too long | expected a shorter name | choose another"),
        (errno.EROFS, "Read-only file system while writing x | expected a writable place | choose another"),
        (
            errno.EACCES,
            "x: Permission denied | expected permission for this user | check the owner and mode of the file",
        ),
    ],
)
def test_an_error_of_the_disk_is_one_line(number, line):
    with pytest.raises(UserError) as refused, refusing_disk_errors("x"):
        raise OSError(number, os.strerror(number))
    assert str(refused.value) == line


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOENT])
def test_a_bug_is_no_error_of_the_disk(tmp_path, number):
    with pytest.raises(OSError, match=os.strerror(number)), whole_file(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_what_cannot_be_synced_does_not_get_its_name(tmp_path, monkeypatch, number):
    made(tmp_path / "x", "old")

    def fails(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError), whole_folder(tmp_path / "x", MARK):
        pass
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / MARK).read_text() == "old"


def test_ctrl_c_during_the_cleanup_waits_for_its_end(tmp_path, monkeypatch):
    def pressed(folder, empty=files._empty):
        os.kill(os.getpid(), signal.SIGINT)
        empty(folder)

    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as new:
        new.write_text("whole")
        monkeypatch.setattr(files, "_empty", pressed)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
