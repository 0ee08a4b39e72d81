"""The wheel holds the agreed packages, and everything that they import is declared."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from wan_trt.extras import PROJECTS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
# Modules that come with another package: the server's stub brings the first, TensorRT's wheel the others.
BROUGHT = {"triton_python_backend_utils", "tensorrt_rtx", "tensorrt"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_agreed_top_level_names(wheel):
    names = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {
        "wan_trt", "wan22", "export", "engines", "runtime", "triton_repo", "gateway", "validate",
    }  # fmt: skip


def test_the_wheel_has_every_module_and_template(wheel):
    files = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(files.split()) <= set(wheel.namelist())


def test_no_public_index_accepts_the_wheel(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    assert "Classifier: Private :: Do Not Upload" in wheel.read(metadata).decode()


def imported() -> set[str]:
    """Top-level modules that production code imports anywhere, functions included."""
    names = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - set(ROOMS)


def declared() -> set[str]:
    """Projects that pyproject.toml declares for users: everything but the extra ``dev``."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    return {line.partition(">")[0].partition("[")[0].strip() for line in lines}


def test_every_import_is_declared():
    projects = {PROJECTS.get(module, module.replace("_", "-")) for module in imported() - BROUGHT}
    assert projects - declared() == set()
