"""The command line answers at once, tells bad input in one line and leaves with the right code."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
from typer.testing import CliRunner

import wan_trt
from runtime.request import Request
from wan22.looks import GROUPS
from wan_trt.__main__ import main
from wan_trt.cli import app
from wan_trt.commands import client, generate, validate
from wan_trt.guard import command_of

FLOW = ("synth", "export", "build", "generate", "validate", "demo")
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "diffusers", "transformers")


def status(arguments):
    """Exit code of one command line."""
    with pytest.raises(SystemExit) as left:
        app(arguments)
    return left.value.code


def refused(capsys, *arguments):
    """The one line that a bad command prints."""
    assert status(list(map(str, arguments))) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    return told[0]


def test_help_names_every_stage_without_loading_torch_or_tensorrt():
    code = (
        "import sys; from wan_trt.cli import app; app(['--help'], standalone_mode=False);"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(command in told for command in FLOW)
    assert told.strip().endswith("[]")


@pytest.mark.parametrize("command", FLOW)
def test_every_command_has_help(command, capsys):
    assert status([command, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_every_public_name_is_there():
    assert {"Request", "generate", "apply_lora", "calibrate", "pack"} < set(dir(wan_trt))
    for name in dir(wan_trt):
        assert getattr(wan_trt, name)


@pytest.mark.parametrize("command", [generate, validate])
def test_every_part_of_a_request_has_an_option(command):
    elsewhere = {"guidance_scale", "lora", "terms", "written", "extended_by"}  # the parts that no option is named after
    parts = {field.name for field in fields(Request)} - elsewhere
    assert parts <= set(signature(command.run).parameters)


@pytest.mark.parametrize("command", [generate, client])
def test_every_group_of_terms_has_an_option(command):
    assert {"look", *(group.option for group in GROUPS.values())} <= set(signature(command.run).parameters)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate"], "wan-trt generate: no engines | expected wan-trt generate [OPTIONS] {engines} [prompt] | see "),
        (
            ["client", "x", "y"],
            "wan-trt client: no -o or --output | expected wan-trt client [OPTIONS] {url} {prompt} | see ",
        ),
        (["plan", "m", "--stepz", "3"], "wan-trt plan: no option --stepz | expected --steps | see "),
        (["plan", "m", "--compare", "3"], "wan-trt plan: no option --compare | expected --compare-precisions | see "),
        (
            ["looks", "--model"],
            "wan-trt looks: no option --model | expected wan-trt looks [OPTIONS] | see wan-trt looks",
        ),
        (
            ["plan", "m", "--steps", "x"],
            "wan-trt plan: --steps x | expected a whole number of at least 1 and at most 1000",
        ),
        (["generate", "e", "--shift", "x"], "wan-trt generate: --shift x | expected a number | see "),
        (
            ["serve", "e", "--queue-size", "0"],
            "wan-trt serve: --queue-size 0 | expected a whole number of at least 1 | ",
        ),
        (
            ["gateway", "e", "--port", "99999"],
            "wan-trt gateway run: --port 99999 | expected a whole number of at least 1 and at most 65535 | see ",
        ),
        (
            ["generate", "e", "--fit", "z"],
            "wan-trt generate: --fit z | expected official or crop | see wan-trt generate",
        ),
        (
            ["plan", "m", "n"],
            "wan-trt plan: n after the last argument | expected wan-trt plan [OPTIONS] {model} | see ",
        ),
        (["plan", "--target"], "wan-trt: --target without a value | expected a value after it | see --help"),
        (["plan", "--rows=3"], "wan-trt plan: no option --rows | expected wan-trt plan [OPTIONS] {model} "),
        (
            ["generate", "--overwrite=3"],
            "wan-trt: --overwrite with a value | expected --overwrite | leave the value out",
        ),
        (["generat"], "wan-trt: no command generat | expected generate | see wan-trt --help"),
        (["frobnicate"], "wan-trt: no command frobnicate | expected synth, export, "),
        (["bundle", "eat"], "wan-trt bundle: no command eat | expected verify, sign, pack, clean | see wan-trt bundle"),
    ],
)
def test_what_does_not_parse_is_one_line(capsys, words, line):
    assert refused(capsys, *words).startswith(line)


@pytest.mark.parametrize("command", [["generate", "e", "x"], ["client", "localhost", "x"]])
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["-o", "a.png", "--frames", "1", "--quality", "5"], "--quality for a.png | expected a name ending in .mp4 or"),
        (["-o", "a.mp4", "--fit", "crop"], "--fit crop without --image | expected an image to fit | leave"),
    ],
)
def test_options_without_effect_are_refused(capsys, tmp_path, monkeypatch, command, options, line):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *command, *options).startswith(f"wan-trt: {line}")


@pytest.mark.parametrize("command", ["serve", "triton"])
def test_every_limit_says_what_it_limits(capsys, command):
    assert status([command, "--help"]) == 0
    told = " ".join(re.split(r"[\s│]+", capsys.readouterr().out))
    usual = {"prompt in bytes of UTF-8": 16 * 1024, "image file in bytes": 32 * 2**20, "denoising steps": 100}
    for what, default in usual.items():
        assert f"{what} of a request; by default {default:,}." in told


def test_no_command_prints_the_help(capsys):
    assert status([]) == 2
    assert "Usage" in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", ["generate", "validate", "bench", "calibrate", "serve", "triton"])
def test_every_command_that_runs_engines_takes_a_residency(command, tmp_path, capsys):
    assert status([command, "--help"]) == 0
    assert "--residency" in capsys.readouterr().out
    assert status(["generate", "e", "x", "-o", str(tmp_path / "o.mp4"), "--residency", "some"]) == 2


def test_an_unknown_model_lists_the_known_ones(tmp_path, capsys):
    assert "t2v-a14b-tiny" in refused(capsys, "synth", "wan3", tmp_path / "c")


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert str(tmp_path) in refused(capsys, "export", tmp_path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_engine_folder_is_not_an_onnx_bundle(tmp_path, tiny_engines, capsys):
    assert "holds engines | expected graphs" in refused(capsys, "build", tiny_engines, tmp_path / "e")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--frames", "16"], "16 frames"),
        (["--size", "100x100"], "size 100x100"),
        (["--size", "big"], "size 'big'"),
        (["--steps", "0"], "0 steps"),
        (["--guidance", "nan"], "guidance nan"),
        (["--shift", "-1"], "shift -1"),
    ],
)
def test_bad_options_of_generate(tmp_path, tiny_engines, capsys, options, told):
    assert told in refused(capsys, "generate", tiny_engines, "a cat", "-o", tmp_path / "out.mp4", *options)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt(tmp_path, tiny_engines, capsys):
    assert "prompt ' '" in refused(capsys, "generate", tiny_engines, " ", "-o", tmp_path / "out.mp4")


def test_a_wrong_option_is_the_parsers_to_refuse(capsys):
    assert status(["synth", "--nonsense"]) == 2


def test_the_demo_does_not_remove_what_it_did_not_make(tmp_path, capsys):
    (tmp_path / "t2v-a14b-tiny").mkdir()
    (tmp_path / "t2v-a14b-tiny" / "mine").touch()
    assert "made by an earlier demo" in refused(capsys, "demo", tmp_path, "--model", "t2v-a14b-tiny")
    assert (tmp_path / "t2v-a14b-tiny" / "mine").exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["inspect", "e", "--html", "."], "page .: a folder"),
        (["demo", "file"], "cannot write the demo file/.made-by-wan-trt-demo: Not a directory"),
        (["export", "ck", "b", "--keep-high-precision", "0,5-1"], "expected ranges that go up | write 1-5"),
        (["triton", "e", "r", "--namespace", "n", "--max-pods", "2"], "--namespace, --max-pods without --kubernetes"),
        (["triton", "e", "r", "--prometheus", "http://p"], "--prometheus without --kubernetes"),
        (["triton", "e", "r", "--kubernetes", "r"], "r for repository and manifests"),
        (["triton", "e", "r", "--kubernetes", "k", "--image", "an image"], "image 'an image'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_read(tmp_path, monkeypatch, capsys, command, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert told in refused(capsys, *command)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "option",
    ["--http-port=0", "--grpc-port=65536", "--metrics-port=-1", "--max-silence=nan", "--gpu-memory=nan"],
)
def test_numbers_that_are_out_of_the_world_are_the_parsers_to_refuse(option):
    assert status(["serve", "engines", option]) == 2


@pytest.mark.parametrize("option", ["--steps=1001", "--steps=100000000000000000000", "--bus=inf", "--bus=nan"])
def test_a_plan_of_what_nobody_has_is_the_parsers_to_refuse(option):
    assert status(["plan", "t2v-a14b", "--target", "rtx5090", option]) == 2


def test_ctrl_c_while_the_modules_load_ends_in_a_line(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "wan_trt.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "wan_trt.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "wan-trt: interrupted\n"


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "wan_trt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"wan-trt {wan_trt.__version__}\n"


def test_too_little_memory_is_told_in_one_line(tmp_path, tiny_engines, monkeypatch, capsys):
    import numpy as np

    import runtime.request

    monkeypatch.setattr(runtime.request, "standard_normal", lambda *_: np.empty(2**55, np.uint8))
    told = refused(capsys, "generate", tiny_engines, "x", "-o", tmp_path / "o.mp4", "--size", "64x64", "--frames", "5")
    assert told.startswith("wan-trt: out of memory: Unable to allocate 32.0 PiB")
    assert told.endswith("| use a smaller --size or fewer --frames")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_one_line(tmp_path, tiny_bundle, monkeypatch, capsys):
    import wan_trt.recipes.calibrate

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device", "graphs.onnx")

    monkeypatch.setattr(wan_trt.recipes.calibrate, "write_tapped", full)
    (tmp_path / "prompts").write_text("a fox")
    told = refused(capsys, "calibrate", tiny_bundle, tmp_path / "s.json", "--prompts", tmp_path / "prompts")
    assert told == "wan-trt: disk full while writing graphs.onnx | expected free space | free some and run again"
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_what_the_user_may_not_read_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", denied)
    told = refused(capsys, "export", tmp_path / "c", tmp_path / "b")
    assert "Permission denied | expected permission for this user" in told


def test_a_bug_keeps_its_traceback(tmp_path, tiny_checkpoint, monkeypatch):
    import export.exporter

    def fails(*_args):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(export.exporter, "write_weights", fails)
    with pytest.raises(OSError, match="Bad file descriptor"):
        app(["export", str(tiny_checkpoint), str(tmp_path / "b"), "--precision", "fp32"])


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    import export.exporter

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.exporter, "write_weights", interrupted)
    assert status(["export", str(tiny_checkpoint), str(tmp_path / "b"), "--precision", "fp32"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["export"], ["lora", "apply"]])
def test_the_help_shows_how_a_lora_is_written(command):
    shown = CliRunner().invoke(app, [*command, "--help"]).output
    assert "[@strength][:high|:low]" in "".join(re.split(r"[\s│]+", shown))


def test_sigterm_ends_a_command_like_ctrl_c(capsys):
    def run():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            command_of(run, "wan-trt")([])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 130
    assert capsys.readouterr().err == "wan-trt: interrupted; no output is left incomplete\n"
