"""README and docs tell the truth: their commands parse and run, their Python runs, their links lead somewhere.

``python tests/test_docs.py`` rewrites ``docs/files.md`` from the first lines of the modules' docstrings.
"""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
from PIL import Image
from safetensors.numpy import save_file

from engines.plan import make_plan
from engines.targets import TARGETS
from export.files.safetensors_file import read_safetensors
from wan22.precision import Precision
from wan22.specs import SPECS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = ROOT / "docs" / "files.md"
ROOMS = ("wan_trt", "wan22", "export", "engines", "runtime", "triton_repo", "gateway", "validate", "comfyui", "studies")
HEAD = "# Files\n\nEvery module with the first line of its docstring. `python tests/test_docs.py` makes this page.\n"
# What the pages name stands for something small here.
STAND_INS = {
    "Wan-AI/Wan2.2-T2V-A14B": "checkpoint",
    "CHECKPOINT": "checkpoint",
    "ckpt": "checkpoint",
    "832x480": "64x64",
    "81": "5",
    "cfg2,ulysses4,vae8": "cfg2,vae8",  # engines of the CPU that divide tokens are built on their own
}
# Commands whose lines run here as they stand; a line with a GPU target or a server is parsed and not run.
KERNELS = ["inspect", "engines"]  # of a GPU's engines
RUN = ("plan", "presets", "export", "build", "inspect", "generate", "bundle", "calibrate")


def tree() -> str:
    """Every module with the first line of its docstring."""
    lines = [HEAD, "```"]
    for room in ROOMS:
        lines.append(f"{room}/")
        for path in sorted((ROOT / room).rglob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            name = path.relative_to(ROOT / room).as_posix()
            lines.append(f"  {name:<28} {said.partition(chr(10))[0]}".rstrip())
    return "\n".join([*lines, "```"]) + "\n"


def blocks(language: str) -> list[tuple[str, str]]:
    """The code blocks of a language with their pages, one script a page."""
    texts = [(page.name, re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)) for page in PAGES]
    return [(name, "\n".join(found)) for name, found in texts if found]


def commands(script: str) -> list[list[str]]:
    """The words of every ``wan-trt`` line of a page, without the program."""
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("wan-trt ")]


def keys_made(script: str) -> list[list[str]]:
    """The words of every ``openssl`` line of a page."""
    return [shlex.split(line, comments=True) for line in script.splitlines() if line.startswith("openssl ")]


TABLED = re.findall(r"\| `(wan-trt [^`]*)` \|", (ROOT / "docs" / "checkpoints.md").read_text())
SCRIPTS = [*(script for _, script in blocks("sh")), "\n".join(TABLED)]
EVERY_COMMAND = sorted({shlex.join(words) for script in SCRIPTS for words in commands(script)})


def test_the_list_of_files_is_that_of_the_repository():
    assert FILES.read_text() == tree(), "run: python tests/test_docs.py"


def test_every_module_says_what_it_is():
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [path for path in modules if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_every_link_leads_to_a_file_and_a_heading():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]*(?:#[^)]*)?)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{page.name}: {target}"


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("model", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_the_figures_of_the_readme_are_those_of_plan(model):
    table = re.search(rf"^\| {model} \|.*\n\|.*$", (ROOT / "README.md").read_text(), re.M | re.I)
    width, height, frames = map(int, re.search(r"(\d+)x(\d+), (\d+) frames", table[0]).groups())
    for row, precision in zip(table[0].splitlines(), (Precision.BF16, Precision.FP8), strict=True):
        plan = make_plan(SPECS[model], TARGETS["rtx5090"], precision, (width, height, frames))
        figures = plan.as_json()
        keys = ("bundle_bytes", "engines_bytes", "export_ram_bytes", "build_ram_bytes")
        needed = (plan.needed["all"], plan.needed["one-component"])
        disk, engines, export, build, *gpu = (round(size / 2**30) for size in (*map(figures.get, keys), *needed))
        shown = f"{precision} | {disk} + {engines} GiB | {export}, {build} GiB | {gpu[0]}, {gpu[1]} GiB |"
        assert row.endswith(f"| {shown}")


@pytest.mark.parametrize("line", EVERY_COMMAND)
def test_every_command_that_is_shown_parses(line):
    from wan_trt.cli import app

    words = shlex.split(line)
    command = typer.main.get_command(app)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if words[0] not in command.commands:  # of wan-trt gateway
            words = ["run", *words]
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)  # raises for an option, a value or an argument that is wrong


@pytest.mark.slow
@pytest.mark.parametrize(("page", "script"), blocks("sh"))
def test_the_commands_of_a_page_run_in_order(page, script, prepared, monkeypatch, capsys):
    from wan_trt.cli import app

    monkeypatch.chdir(prepared)
    for words in keys_made(script):
        subprocess.run(words, check=True, capture_output=True)
    for words in commands(script):
        for_gpu = "--target" in words and words[0] != "plan"
        with_slots = words[0] == "generate" and "--lora" in words  # engines of a build for a GPU
        for_gpu = for_gpu or with_slots or words[:2] == KERNELS
        if words[0] not in RUN or for_gpu:
            continue
        small = [STAND_INS.get(word, word) for word in words]
        if "--image" in words:
            small[small.index("engines")] = "i2v-engines"
        for output in ("onnx", "engines"):
            if output in small[1:3] and words[0] in ("export", "build") and small[-1] != "--overwrite":
                small.append("--overwrite")
        with pytest.raises(SystemExit) as left:
            app(small)
        assert left.value.code == 0, f"{page}: {shlex.join(small)}: {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "script"), [block for block in blocks("python") if block[0] != "serving.md"])
def test_the_python_of_a_page_runs(page, script, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    for name, maker in (("onnx", "export_checkpoint"), ("engines", "build_engines")):
        if maker in script:
            shutil.rmtree(prepared / name)
    exec(compile(script, page, "exec"), {})


@pytest.fixture
def prepared(tmp_path, flow_of) -> Path:
    """A folder with all that the pages take for granted, in small."""
    flow = flow_of("t2v-a14b-tiny")
    (tmp_path / "checkpoint").symlink_to(flow.checkpoint)
    shutil.copytree(flow.bundle, tmp_path / "onnx")
    shutil.copytree(flow.engines, tmp_path / "engines")
    (tmp_path / "prompts.txt").write_text("A red panda\nA fox\n")
    (tmp_path / "i2v-engines").symlink_to(flow_of("i2v-a14b-tiny").engines)
    for name in ("photo.jpg", "first.jpg", "last.jpg"):
        Image.new("RGB", (96, 64), (200, 30, 60)).save(tmp_path / name)
    (tmp_path / "Seko-V1.1").mkdir()
    bias = read_safetensors(flow.bundle / "high_noise.safetensors")["blocks.0.ffn.0.bias"].read()
    for name in ("high_noise_model", "low_noise_model"):
        save_file({"diffusion_model.blocks.0.ffn.0.diff_b": bias}, tmp_path / "Seko-V1.1" / f"{name}.safetensors")
    return tmp_path


if __name__ == "__main__":
    FILES.write_text(tree())
