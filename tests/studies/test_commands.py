"""Studies handle bad input like ``wan-trt``, and their old names point to the new ones."""

import errno
import subprocess
import sys
from importlib import import_module

import pytest

from wan22.errors import UserError
from wan_trt.cli import app as wan_trt

# study → a bad option and part of the error
BAD = {
    "precision": (["--model", "wan3"], "model 'wan3'"),
    "gpu": (["--dry-run", "--only", "vea"], "stage 'vea'"),
    "full_size": (["wan3"], "model 'wan3'"),
}


def command_of(study):
    return import_module(f"studies.{study}.__main__")


def status(app, arguments):
    with pytest.raises(SystemExit) as left:
        app(arguments)
    return left.value.code


@pytest.mark.parametrize("study", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, study):
    monkeypatch.chdir(tmp_path)
    options, found = BAD[study]
    assert status(command_of(study).app, [*options, "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"python -m studies.{study}: {found} | expected ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("study", BAD)
def test_the_parser_refuses_an_unknown_option(study):
    assert status(command_of(study).app, ["--nonsense"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a", "b", "c"), 2, "a | expected b | c"),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), 2, "disk full while writing x.json"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("study", BAD)
def test_expected_failures_end_in_one_line(monkeypatch, capsys, study, error, code, line):
    module = command_of(study)

    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(module, {"precision": "bars", "gpu": "_write", "full_size": "_write"}[study], fails)
    assert status(module.app, ["--dry-run"] if study == "gpu" else ["-o", "out"]) == code
    (printed,) = capsys.readouterr().err.strip().splitlines()
    assert printed.startswith(f"python -m studies.{study}: {line}")


@pytest.mark.parametrize("study", BAD)
def test_a_bug_keeps_its_traceback(monkeypatch, study):
    module = command_of(study)

    def fails(*_args, **_kwargs):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(module, {"precision": "bars", "gpu": "_write", "full_size": "_write"}[study], fails)
    with pytest.raises(OSError, match="Bad file descriptor"):
        module.app(["--dry-run"] if study == "gpu" else ["-o", "out"])


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["t2v-a14b", "--builds"], ["--only", "memory", "--case", "fp16", "-o", "s.json"]]
)
def test_the_old_name_of_the_study_of_full_size_names_the_new_one(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert status(wan_trt, ["scale", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("wan-trt: wan-trt scale has moved | expected python -m studies.full_size | ")
    assert list(tmp_path.iterdir()) == []


def test_the_old_name_of_the_study_of_gpus_names_the_new_one(tmp_path):
    command = [sys.executable, "-m", "validate.gpu_run", "--dry-run", "-o", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_run: validate.gpu_run has moved | expected python -m studies.gpu | ")
    assert not list(tmp_path.iterdir())
