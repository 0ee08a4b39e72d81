"""Outputs of every command: who else writes them, names that work, names that are refused before the work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.faults.commands import COMMANDS, Inputs
from tests.wan_trt.test_cli import refused
from triton_repo.repository import MARK as REPOSITORY_MARK
from wan22.errors import UserError
from wan22.files import LOCK, claim, whole_folder
from wan22.outputs import check_no_source
from wan_trt.cli import app
from wan_trt.commands.demo import MARK

PIECEMEAL = {"demo": MARK, "r": "report.json", "calls": "calls"}  # what stands for a folder that is filled bit by bit
QUICK = ("--size", "64x64", "--frames", "1", "--steps", "1")
NEED_A_GPU_TARGET = ("inspect", "lora apply")


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint, tiny_bundle, tiny_engines, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts"
    prompts.write_text("a fox\n")
    return Inputs(tiny_checkpoint, tiny_bundle, tiny_engines, prompts)


OUTPUTS = [(name, output) for name, its in COMMANDS.items() if name not in NEED_A_GPU_TARGET for output in its.outputs]


@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_the_second_writer_of_an_output_is_refused_in_one_line(name, output, inputs, tmp_path, capsys):
    held = tmp_path / output
    with claim(held / PIECEMEAL[output] if COMMANDS[name].piecemeal else held):
        line = refused(capsys, *COMMANDS[name].words(inputs, tmp_path))
    assert "another process writes" in line
    assert str(held) in line


@pytest.mark.parametrize("name", ["[/x]", "[bold]cat.png", "take[1].png", "x" * 251 + ".png", "猫" * 83 + ".png"])
def test_every_name_of_an_output_works_and_is_printed_as_it_is(name, tiny_engines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["generate", str(tiny_engines), "a", "-o", name, *QUICK])
    assert done.exit_code == 0, done.output
    assert f"{name}: 64x64, 1 frame" in done.output
    assert Path(name).exists()


@pytest.mark.parametrize("output", ["-", "/proc/a.mp4", "/dev/null", "/dev/x.mp4", "file/x.mp4", "x" * 252 + ".mp4"])
def test_an_output_that_cannot_be_is_refused_before_the_work(output, tiny_engines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runtime.pipeline.Pipeline.denoise", lambda *_: pytest.fail("it was begun"))
    Path("file").touch()
    refused(capsys, "generate", tiny_engines, "a", "-o", output, *QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", ["bench e -o notes.txt", "bench e -o notes", "inspect e --html notes.txt"])
def test_what_may_be_another_file_is_not_replaced(words, tiny_engines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("e").symlink_to(tiny_engines)
    Path("notes.txt").write_text("mine")
    assert "expected a file that ends in ." in refused(capsys, *words.split())
    assert Path("notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        "export c o --precision fp8 --input-scales pipe",
        "export c o --precision fp8 --input-means pipe",
        "export pipe o",
        "export c o --vae pipe",
        "export c o --tokenizer pipe",
        "calibrate b s.json --prompts pipe",
        "validate e c --prompts pipe",
        "validate e c --gate pipe",
        "bench e --gate pipe",
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(words, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for name, path in (("c", inputs.checkpoint), ("b", inputs.graphs), ("e", inputs.engines)):
        Path(name).symlink_to(path)
    assert "pipe is a named pipe | expected a file | copy its content" in refused(capsys, *words.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "e", "pipe"]


@pytest.mark.parametrize("command", ["bench", "sweep"])
def test_a_device_is_not_replaced_by_a_file(command, tiny_engines, capsys):
    words = ["--sweep", "steps", "--values", "1,2"] if command == "sweep" else ["--only", "text_encoder"]
    assert "/dev/null is a device" in refused(capsys, "bench", tiny_engines, *words, "-o", "/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("preview", "told"), [("nowhere/p.jpg", "nowhere/p.jpg: no such folder"), (".", "preview .: a folder")]
)
def test_a_preview_that_cannot_be_written_is_refused_before_a_server_is_asked(
    preview, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "client", "localhost:1", "a", "-o", "o.png", "--frames", 1, "--preview", preview)
    assert told in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [[b"synth", b"t2v-a14b-tiny", b"caf\xe9"], [b"generate", b"e", b"a \xff cat", b"-ox"]]
)
def test_words_that_are_not_utf8_are_refused(words, tmp_path):
    program = [sys.executable, "-c", "from wan_trt.cli import main; main()"]
    done = subprocess.run([*map(os.fsencode, program), *words], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"wan-trt: b'") and done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_cleaned_up_by_a_command(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    dead = tmp_path / ".dead.partial"
    dead.mkdir()
    (dead / LOCK).touch()
    (dead / "half").touch()
    with whole_folder(tmp_path / "living") as living:
        cleaned = CliRunner().invoke(app, ["bundle", "clean", str(tmp_path)])
        again = CliRunner().invoke(app, ["bundle", "clean", str(tmp_path)])
        assert living.exists()
    assert cleaned.output == f"{dead}: 0 B removed\n"
    assert again.output == f"{tmp_path}: no leftovers of wan-trt\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living", "tmp"]
    nowhere = CliRunner().invoke(app, ["bundle", "clean", str(tmp_path / "typo")])
    assert nowhere.exit_code == 2
    assert "typo is not a folder" in " ".join(nowhere.output.split())


OVER_INPUTS = {  # words after wan-trt; b and e are bundles, r a folder with the mark of written repositories
    "export": "export b/checkpoint b --overwrite",
    "export file": "export b --text-encoder c --high-noise b/x --low-noise c --vae c --overwrite",
    "export lora": "export c b --lora b/x --overwrite",
    "export scales": "export c b --input-scales b/x --overwrite",
    "export means": "export c b --input-means b/x --overwrite",
    "build": "build e/onnx e --overwrite",
    "pack": "bundle pack e e --overwrite",
    "pack inside": "bundle pack e/onnx/../../e e --overwrite",
    "lora apply": "lora apply e x -o e --overwrite",
    "lora apply lora": "lora apply engines e/x -o e --overwrite",
    "lora apply checkpoint": "lora apply engines x -o e --checkpoint e/onnx --overwrite",
    "calibrate": "calibrate b b/bundle.json --prompts p --overwrite",
    "calibrate means": "calibrate b s --means b/high_noise.safetensors --prompts p --overwrite",
    "calibrate prompts": "calibrate b p --prompts p --overwrite",
    "generate image": "generate engines a --image r/frame_00000.png -o r --overwrite --size 64x64 --frames 5",
    "generate noise": "generate engines a --noise x.npz -o x.npz --size 64x64 --frames 1",
    "triton": "triton r/engines r --overwrite",
    "kubernetes": "triton r/engines q --kubernetes r --overwrite",
    "mlperf": "mlperf r/engines -o r --overwrite --size 64x64 --frames 5",
    "mlperf prompts": "mlperf engines -o r --prompts r/report.json --overwrite --size 64x64 --frames 5",
    "mlperf noise": "mlperf engines -o r --noise r/frame_00000.png --overwrite --size 64x64 --frames 5",
    "validate": "validate engines c -o r --bench r/report.json",
    "bench": "bench engines --compare p -o p --only text_encoder",
    "bench manifest": "bench e -o e/bundle.json --only text_encoder",
    "inspect": "inspect e --html e/high_noise.onnx",
    "client": "client localhost:1 a --image i.png -o i.png --frames 1",
    "preview": "client localhost:1 a --image i.png -o o.png --preview i.png --frames 1",
}


@pytest.fixture(scope="module")
def mixed(inputs, tmp_path_factory):
    """A folder in which outputs hold inputs."""
    folder = tmp_path_factory.mktemp("mixed")
    for copy, source in (("b", inputs.graphs), ("e", inputs.engines), ("e/onnx", inputs.graphs)):
        shutil.copytree(source, folder / copy)
    for copy, source in (("c", inputs.checkpoint), ("b/checkpoint", inputs.checkpoint), ("engines", inputs.engines)):
        shutil.copytree(source, folder / copy)
    shutil.copytree(inputs.engines, folder / "r" / "engines")
    for name in ("b/x", "e/x", "x", "i.png", "r/frame_00000.png", "r/report.json", f"r/{REPOSITORY_MARK}"):
        (folder / name).touch()
    (folder / "p").write_text("a fox\n")
    np.savez(folder / "x.npz", np.zeros((1, 16, 1, 8, 8), np.float32))
    return folder


@pytest.mark.parametrize("words", OVER_INPUTS.values(), ids=OVER_INPUTS)
def test_no_output_takes_the_place_of_an_input(words, mixed, monkeypatch, capsys):
    monkeypatch.chdir(mixed)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert "an output apart from the inputs" in refused(capsys, *words.split())
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    "words",
    [
        "client localhost:1 a -o q.png --preview ./q.png --frames 1",
        "bench engines --sweep frames --values 5,9 --plot p.html -o p.html",
        "calibrate b s --means ./s --prompts p",
    ],
)
def test_two_outputs_have_two_names(words, mixed, monkeypatch, capsys):
    monkeypatch.chdir(mixed)
    before = set(mixed.rglob("*"))
    assert "for two outputs | expected a name for each" in refused(capsys, *words.split())
    assert set(mixed.rglob("*")) == before


def test_links_to_an_input_count_as_the_input_and_new_names_in_its_folder_do_not(tmp_path):
    photo, link = tmp_path / "photo.png", tmp_path / "link.png"
    photo.write_bytes(b"mine")
    link.symlink_to(photo)
    for output in (tmp_path / "new.png", None):
        check_no_source(output, photo, tmp_path, None, b"bytes", tmp_path / "none")
    for output in (photo, link):
        with pytest.raises(UserError, match=r"is an input \| expected an output apart"):
            check_no_source(output, None, photo)
