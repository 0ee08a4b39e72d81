"""A killed export resumes where its journal ends, and two exports never write the same folder."""

import multiprocessing
import random
import shutil
import signal
import time
from contextlib import closing
from dataclasses import replace

import pytest

from export.exporter import export_checkpoint
from export.files.resumable import Journal, partial_folder, resumable_folder
from export.graphs import weights_file
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from wan22.bundle import sha256_of
from wan22.component import File
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS

BF16 = ExportOptions(Precision.BF16)


def contents(folder):
    return {path.relative_to(folder): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def marked_often(monkeypatch):
    monkeypatch.setattr(weights_file, "MARK_EVERY_BYTES", 2**20)


def stopped_after(reports):
    """A progress that presses Ctrl-C."""

    def progress(task, done, total, unit=""):
        nonlocal reports
        reports -= task == "export weights"
        if not reports:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_export_goes_on_and_ends_byte_identical(tmp_path, tiny_checkpoint, monkeypatch):
    marked_often(monkeypatch)
    export_checkpoint(tiny_checkpoint, tmp_path / "whole", BF16)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16, stopped_after(100))
    assert not (tmp_path / "b").exists()
    kept = partial_folder(tmp_path / "b") / "text_encoder.safetensors"
    made = kept.stat().st_mtime_ns
    seen = []
    monkeypatch.setattr(
        weights_file, "_put", lambda *args, original=weights_file._put: (seen.append(args[1]), original(*args))
    )
    export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")
    assert (tmp_path / "b" / "text_encoder.safetensors").stat().st_mtime_ns >= made
    assert "token_embedding.weight" not in seen
    assert not partial_folder(tmp_path / "b").exists()


def test_what_is_on_disk_is_believed_only_if_its_hash_is_right(tmp_path, tiny_checkpoint, monkeypatch):
    marked_often(monkeypatch)
    export_checkpoint(tiny_checkpoint, tmp_path / "whole", BF16)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16, stopped_after(100))
    with (partial_folder(tmp_path / "b") / "text_encoder.safetensors").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 64)
    export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_another_precision_starts_afresh(tmp_path, tiny_checkpoint, tiny_bundle, monkeypatch):
    marked_often(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16, stopped_after(100))
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP32))
    assert contents(tmp_path / "b") == contents(tiny_bundle)


def test_the_second_of_two_exports_into_one_folder_is_refused(tmp_path, tiny_checkpoint):
    with resumable_folder(tmp_path / "b", "the first"):
        with pytest.raises(UserError, match="another process writes"):
            export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
        assert partial_folder(tmp_path / "b").exists()


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    with (
        pytest.raises(UserError, match="run again to go on"),
        resumable_folder(tmp_path / "b", "x") as (folder, journal),
    ):
        (folder / "w").write_bytes(b"weights")
        journal.record(File("w", sha256_of(folder / "w"), 7))
        raise OSError(28, "No space left on device")
    with resumable_folder(tmp_path / "b", "x") as (folder, journal):
        assert journal.verify(folder / "w")[0] == 7


@pytest.mark.parametrize("line", [b'{"path": "\xf6', b"[" * 100_000, b'{"path"'], ids=["not UTF-8", "deep", "cut"])
def test_a_damaged_line_ends_the_journal(tmp_path, line):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "w").write_bytes(b"weights")
    whole = b'{"path": "w", "sha256": "%s", "size_bytes": 7}' % sha256_of(tmp_path / "b" / "w").encode()
    (tmp_path / "journal").write_bytes(b"\n".join([b"x", whole, line, whole]) + b"\n")
    with closing(Journal(tmp_path / "journal")) as journal:
        journal.begin(tmp_path / "b", "x")
        assert journal.verify(tmp_path / "b" / "w")[0] == 7


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="bug"), resumable_folder(tmp_path / "b", "x") as (folder, _):
        (folder / "w").write_bytes(b"weights")
        raise ValueError("bug")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), resumable_folder(tmp_path / "file" / "b", "x"):
        pass


def exported(checkpoint, folder):
    weights_file.MARK_EVERY_BYTES = 2**22
    export_checkpoint(checkpoint, folder, BF16)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(tmp_path):
    tiny = SPECS["t2v-a14b-tiny"]
    synthesise(replace(tiny, dit=replace(tiny.dit, layers=8, ffn_width=2048)), tmp_path / "c", "official", seed=0)
    started = time.perf_counter()
    whole = contents(export_checkpoint(tmp_path / "c", tmp_path / "whole", BF16).folder)
    seconds, kills = time.perf_counter() - started, 0
    moments, context = random.Random(5), multiprocessing.get_context("fork")
    while kills < 10:
        process = context.Process(target=exported, args=(tmp_path / "c", tmp_path / "b"))
        process.start()
        process.join(moments.uniform(0, seconds))
        process.kill()  # no effect on a process that has ended
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (tmp_path / "b").exists():
            assert contents(tmp_path / "b") == whole
            shutil.rmtree(tmp_path / "b")
    export_checkpoint(tmp_path / "c", tmp_path / "b", BF16)
    assert contents(tmp_path / "b") == whole
