"""The images' install steps, as the Containerfile has them, in empty environments; no container engine is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

from triton_repo.server import free_ports

ROOT = Path(__file__).parents[1]
CHECKOV = ROOT / ".venv-checkov" / "bin" / "checkov"
FOLDERS = ("/opt", "/install", "/source", "/data")


def stages():
    """Stage → its instructions, as (word, rest), in order."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Containerfile").read_text())
    found = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            current = found.setdefault(rest.rpartition(" ")[2], [])
        elif word.isupper() and word != "ARG":
            current.append((word, rest))
    return found


def inside(root, text):
    """``text`` with the image's folders below ``root``."""
    return re.sub(rf"(?<![\w.])({'|'.join(FOLDERS)})(?=[/\s]|$)", lambda match: f"{root}{match[1]}", text)


def install(instructions, root):
    """Do what an engine does with COPY, WORKDIR and RUN, with a fresh environment for every RUN."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    work = root
    for word, rest in instructions:
        if word == "WORKDIR":
            work = Path(inside(root, rest))
            work.mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, work / target)
        elif word == "RUN":
            command = re.sub(r"^python3(?= )", sys._base_executable, inside(root, rest))
            environment = {"PATH": os.defpath, "HOME": str(root), "PIP_NO_COMPILE": "1", **kept}
            run = {"shell": True, "cwd": work, "env": environment, "capture_output": True, "text": True}
            done = subprocess.run(command, check=False, **run)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_gateways_image_has_what_the_gateway_needs_and_no_more(tmp_path):
    made = stages()
    install(made["wheel"], tmp_path)
    install(made["gateway"], tmp_path)
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    files = subprocess.run(["git", "ls-files", *rooms], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (site,) = (tmp_path / "opt/wan-trt/lib").glob("python3*/site-packages")
    assert [name for name in files.split() if not (site / name).is_file()] == []
    assert not {"torch", "onnxruntime", "pytest", "hatchling"} & {path.name for path in site.iterdir()}
    (port,) = free_ports(1)
    command = [tmp_path / "opt/wan-trt/bin/wan-trt", "gateway", "--server", "dns:localhost:1", "--require-keys",
               "--data", tmp_path / "data", "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, env={"PATH": os.defpath}, stdout=subprocess.PIPE, text=True)
    try:
        assert "the gateway is ready" in process.stdout.readline()
        health = next(rest for word, rest in made["gateway"] if word == "HEALTHCHECK")
        python, *words = json.loads(health.removeprefix("CMD "))
        look = [tmp_path / "opt/wan-trt/bin" / python, *(text.replace("8080", str(port)) for text in words)]
        subprocess.run(look, check=True, env={"PATH": os.defpath})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert b'<form id="entry">' in answer.read()
    finally:
        process.kill()
        process.wait()


def test_the_servers_packages_can_all_be_had_with_their_hashes(tmp_path):
    """Packages for a GPU are several GB, so they are resolved for the image's Python and not fetched."""
    (run,) = (rest for word, rest in stages()["server"] if word == "RUN" and "--require-hashes" in rest)
    assert run.endswith("--no-deps --require-hashes -r requirements-server.txt")
    image = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39", "--target", str(tmp_path)]
    command = [Path(sys.executable).with_name("uv"), "pip", "install", "--dry-run", "--no-cache", "--require-hashes"]
    done = subprocess.run(
        [*command, *image, "-r", "requirements-server.txt"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = re.findall(r"^[\w.-]+==\S+", (ROOT / "requirements-server.txt").read_text(), re.MULTILINE)
    assert {line.removeprefix(" + ") for line in done.stderr.splitlines() if line.startswith(" + ")} == set(wanted)


def test_images_end_as_a_user_without_rights_and_every_install_is_pinned():
    made = stages()
    for name in ("gateway", "server"):
        assert ("USER", "10001:10001") in made[name]
        assert [word for word, _ in made[name]].index("USER") > max(
            number for number, (word, _) in enumerate(made[name]) if word == "RUN"
        )
    installs = [rest for rests in made.values() for word, rest in rests if word == "RUN" and "pip install" in rest]
    assert len(installs) == 5
    assert all("--no-deps" in rest and ("--require-hashes" in rest or "/opt/wheel/" in rest) for rest in installs)


def test_checkov_finds_nothing_in_the_containerfile(tmp_path):
    if not CHECKOV.is_file():
        pytest.skip("no checkov, run make checkov")
    shutil.copy(ROOT / "Containerfile", tmp_path / "Dockerfile")
    command = [CHECKOV, "-d", tmp_path, "--framework", "dockerfile", "--skip-download", "-o", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    assert [check["check_id"] for check in found["results"]["failed_checks"]] == []
    assert found["summary"]["passed"] > 0
