"""A step cache on the command line: recorded, repeated exactly, refused where it cannot work."""

import hashlib
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.recipe import read_recipe
from wan22.caching import Caching
from wan22.errors import UserError
from wan_trt.cache_options import caching_from
from wan_trt.cli import app

NONE = dict.fromkeys(
    ("cache", "cache_threshold", "first_exact", "last_exact", "max_consecutive", "skip_steps", "reuse", "late_cfg")
)
SMALL = ("--size", "64x48", "--frames", "1", "--steps", "14", "--seed", "5")
EASY = ("--cache", "easy", "--cache-threshold", "9", "--first-exact", "3")


def run(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return re.sub(r"\s+", " ", result.output)


def pixels(path):
    from PIL import Image

    return hashlib.sha256(Image.open(path).tobytes()).hexdigest()


@pytest.fixture
def easy(tiny_engines, tmp_path):
    """A picture made with EasyCache and late guidance, and what was printed."""
    return tmp_path / "easy.png", run(
        "generate", tiny_engines, "x", "-o", tmp_path / "easy.png", *SMALL, *EASY, "--late-cfg", "auto", "--verbose"
    )


def test_the_decisions_of_a_run_are_recorded_printed_and_repeated(tiny_engines, tmp_path, easy):
    picture, printed = easy
    cache = read_recipe(picture).cache
    assert cache.easy
    assert cache.skip_steps
    assert cache.late_cfg
    shown = ",".join(map(str, cache.skip_steps))
    assert f"skipped {len(cache.skip_steps)} of 14 steps: --skip-steps {shown}" in printed
    late = ("--late-cfg", ",".join(map(str, cache.late_cfg)))
    assert " ".join(late) in printed
    assert "skipped" in printed.partition("Denoising")[2]
    (tmp_path / "list.txt").write_text(f"# steps\n{shown}\n")
    for way in (shown, picture, tmp_path / "list.txt"):
        run("generate", tiny_engines, "x", "-o", tmp_path / "list.png", *SMALL, "--skip-steps", way, *late)
        assert pixels(tmp_path / "list.png") == pixels(picture)
    run("generate", tiny_engines, "--again", picture, "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_a_cache_changes_the_picture_and_none_leaves_no_trace(tiny_engines, tmp_path, easy):
    run("generate", tiny_engines, "x", "-o", tmp_path / "exact.png", *SMALL)
    assert read_recipe(tmp_path / "exact.png").cache is None
    assert b'"cache"' not in (tmp_path / "exact.png").read_bytes()
    assert pixels(tmp_path / "exact.png") != pixels(easy[0])


def test_a_list_of_another_model_is_refused(flow_of, tiny_engines, tmp_path, easy):
    shown = run(
        "generate", flow_of("ti2v-5b-tiny").engines, "x", "-o", tmp_path / "a.png", "--skip-steps", easy[0], code=2
    )
    assert "was made by t2v-a14b-tiny | expected a video of ti2v-5b-tiny" in shown


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--cache", "easy", "--skip-steps", "11"), "--cache easy with --skip-steps"),
        (("--cache-threshold", "0.1"), "--cache-threshold without --cache easy"),
        (("--last-exact", "3"), "--last-exact without --cache easy"),
        (("--reuse", "hold"), "--reuse without skipped steps"),
        (("--reuse", "hold", "--late-cfg", "auto"), "--reuse without skipped steps"),
        (("--skip-steps", "5,5"), "each step once"),
        (("--skip-steps", "no-such-file"), "--skip-steps no-such-file: No such file"),
        (("--skip-steps", "no-such-file.mp4"), "no-such-file.mp4: No such file"),
        (("--skip-steps", ""), "--skip-steps '' | expected step numbers from 0"),
        (("--skip-steps", "-1"), "--skip-steps '-1' | expected step numbers from 0"),
        (("--skip-steps", "x" * 5000), f"--skip-steps {'x' * 60}…: File name too long"),
        (("--skip-steps", "5,6", "--late-cfg", "5,6"), "skip and late-cfg step 5, 6"),
        (("--guidance-high-noise", "1", "--late-cfg", "4"), "late-cfg step 4"),
        (("--late-cfg", "late"), "--late-cfg 'late'"),
        (("--cache", "easy", "--steps", "4"), "a step cache with 4 steps"),
        (("--cache", "easy", "--preset", "lightning"), "a step cache with lightx2v-4step"),
        (("--cache", "easy", "--cache-threshold", "-1"), "cache threshold -1"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(tiny_engines, tmp_path, words, found):
    steps = () if "--steps" in words or "--preset" in words else ("--steps", "14")
    shown = run("generate", tiny_engines, "x", "-o", tmp_path / "a.png", "--frames", 1, *steps, *words, code=2)
    assert found in shown
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"# nothing\n"])
def test_a_file_without_a_list_is_refused(tmp_path, content):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match="list"):
        caching_from(NONE | {"skip_steps": str(tmp_path / "list")})


@pytest.mark.parametrize("ending", ["", ".mp4", ".png"])
def test_a_pipe_or_a_device_is_refused_by_its_type(tmp_path, ending):
    os.mkfifo(tmp_path / f"pipe{ending}")
    (tmp_path / f"zero{ending}").symlink_to("/dev/zero")
    for name, words in (("pipe", "a named pipe"), ("zero", "a device")):
        with pytest.raises(UserError, match=words):
            caching_from(NONE | {"skip_steps": str(tmp_path / f"{name}{ending}")})


def test_a_list_has_at_most_64_kib(tmp_path):
    listed = tmp_path / "list"
    listed.write_text("11,12\n#".ljust(2**16, "x"))
    assert caching_from(NONE | {"skip_steps": str(listed)}) == Caching(skip_steps=(11, 12))
    with listed.open("a") as file:
        file.write("x")
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"list is larger than 64 KiB"):
        caching_from(NONE | {"skip_steps": str(listed)})


@pytest.mark.parametrize(
    "words",
    [
        "generate {engines} x -o list.png --frames 1 --skip-steps list.png",
        "client localhost:1 x -o list.png --frames 1 --skip-steps list.png",
        "client localhost:1 x -o new.png --preview list.png --frames 1 --skip-steps list.png",
        "bench {engines} -o list.png --steps 14 --skip-steps list.png",
        "bench {engines} -o list --steps 14 --skip-steps list",
        "validate {engines} {checkpoint} -o . --frames 1 --steps 14 --skip-steps report.json",
    ],
)
def test_an_output_does_not_replace_the_list(tiny_engines, tiny_checkpoint, tmp_path, monkeypatch, easy, words):
    monkeypatch.chdir(tmp_path)
    easy[0].rename("list.png")
    for name in ("list", "report.json"):
        Path(name).write_text("5\n")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    shown = run(*words.format(engines=tiny_engines, checkpoint=tiny_checkpoint).split(), code=2)
    assert f"{words.split()[-1]} is an input | expected an output apart from the inputs" in shown
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_nothing_asked_is_no_cache():
    assert caching_from(NONE) is None
    assert caching_from(NONE | {"skip_steps": "magcache"}) == Caching(skip_steps="magcache")
