"""docs/extending.md names all the files that know a model or a precision, and what is added there works everywhere."""

import ast
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from export.checkpoint.checkpoint import open_checkpoint
from export.synth.checkpoint import synthesise
from runtime.prompts import read_prompts
from runtime.request import Request
from validate.ladder.rungs import rungs
from validate.sample_image import picture_for
from wan22 import sampling, specs
from wan22.precision import Number, Precision
from wan22.sampling import Preset
from wan22.specs import SPECS, Takes, Task

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES_AT_MOST = 8


def production():
    """Every file of the wheel with its syntax tree."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in files}


@pytest.fixture(scope="module")
def trees():
    return production()


def tables():
    """Heading of a section → the files in its table."""
    sections = re.split(r"^## ", PAGE, flags=re.M)[1:]
    return {s.splitlines()[0]: re.findall(r"^\| `([\w/.]+\.\w+)`", s, flags=re.M) for s in sections}


def attributes_of(tree, name):
    """Members of the class ``name`` that a file mentions."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == name}


@pytest.mark.parametrize(("heading", "files"), tables().items(), ids=tables())
def test_a_table_names_at_most_eight_files_and_all_exist(heading, files):
    assert 0 < len(files) <= FILES_AT_MOST
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_models_are_told_apart_in_their_own_file_only(trees):
    for path, tree in trees.items():
        if path == "wan22/specs.py":
            continue
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "Task" not in {name.name for node in imports for name in node.names}, path
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        parts = [part for node in compared for side in (node.left, *node.comparators) for part in ast.walk(side)]
        assert not [part for part in parts if isinstance(part, ast.Attribute) and part.attr == "task"], path


def test_quantised_precisions_are_named_in_their_own_file_only(trees):
    quantised = {precision.name for precision in Precision if precision.quantised and precision.attention.bits < 16}
    assert quantised == {"FP8_ATTN", "INT8_FP8_ATTN", "NVFP4_FP8_ATTN", "NVFP4_FFN_FP8_ATTN"}
    for path, tree in trees.items():
        assert path == "wan22/precision.py" or not attributes_of(tree, "Precision") & quantised, path


def test_quantised_numbers_are_known_to_the_files_of_the_table_only(trees):
    quantised = {number.name for number in Number if number.bits == 8}
    knowing = {path for path, tree in trees.items() if quantised & attributes_of(tree, "Number")}
    assert knowing <= set(tables()["A precision"])


@pytest.mark.parametrize("precision", Precision)
def test_a_precision_is_two_numbers_and_a_wide_companion(precision):
    assert not precision.wide.quantised
    assert precision.wide.wide is precision.wide
    assert precision.quantised == (precision.linears.bits < 16)
    assert precision.significand <= precision.wide.significand
    assert precision.attention in (Number.FP8, precision.wide.attention)


@pytest.fixture
def fake(monkeypatch):
    """A variant and a preset, each in its table and nowhere else."""
    tiny = SPECS["i2v-a14b-tiny"]
    variant = replace(
        tiny,
        name="i2v-fake",
        dit=replace(tiny.dit, layers=1),
        sampling=replace(tiny.sampling, shift=7.0, boundary=0.85),
    )
    monkeypatch.setitem(SPECS, variant.name, variant)
    changes = {"solver": "euler", "steps": 3, "sigmas": (1.0, 0.757, 0.522), "switch_step": 1}
    monkeypatch.setitem(sampling.PRESETS, "fake-3step", Preset("nobody", ("i2v",), changes))
    return variant


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_variant_of_the_table_is_recognised_in_a_checkpoint(fake, layout, tmp_path):
    synthesise(fake, tmp_path / "checkpoint", layout, seed=1)
    assert open_checkpoint(tmp_path / "checkpoint").spec == fake


def test_a_preset_of_the_table_samples(fake):
    asked = fake.with_preset("fake-3step")
    assert (asked.sampling.shift, asked.sampling.boundary, asked.sampling.preset) == (7.0, 0.85, "fake-3step")
    assert [asked.expert_at(t, step) for step, t in enumerate((1000, 757, 522))] == ["high_noise", *["low_noise"] * 2]


def test_what_a_model_takes_is_said_in_one_place(monkeypatch, tmp_path):
    """A text-to-video model becomes one that may start from an image, by its row alone."""
    spec = SPECS["t2v-a14b-tiny"]
    (tmp_path / "image.png").write_bytes(b"")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a fox", "image": "image.png"}\n')
    before = spec.components
    monkeypatch.setitem(specs.TAKES, Task.T2V, Takes("optional", resizing="cover", clean_first_frame=True))
    assert set(spec.components) - set(before) == {"vae_encoder_first"}
    assert {rung.subject for rung in rungs(spec)} >= {"text_mode", "pixels", "encode"}
    assert read_prompts(lines, spec.takes.image)[0].image == tmp_path / "image.png"
    assert Request("a fox", image=picture_for((64, 64)), size=(64, 64), frames=1).completed(spec).image is not None
