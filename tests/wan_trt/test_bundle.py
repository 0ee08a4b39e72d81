"""``wan-trt bundle``: verify finds one wrong byte, pack copies nothing that verify refuses."""

import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from wan22.bundle import file_entry, open_bundle, write_manifest
from wan22.specs import Precision
from wan22.stamp import Stamp
from wan_trt.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["bundle", *map(str, arguments)])


def test_verify_hashes_everything(tmp_path, tiny_bundle):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    assert run("verify", tmp_path / "b").exit_code == 0
    with (tmp_path / "b" / "low_noise.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    result = run("verify", tmp_path / "b")
    assert result.exit_code == 2
    assert "low_noise.safetensors" in result.stderr


@pytest.mark.parametrize("verb", ["verify", "pack"])
def test_a_plan_is_taken_at_its_own_word(tmp_path, tiny_engines, verb):
    bundle = open_bundle(shutil.copytree(tiny_engines, tmp_path / "e"), "engines")
    plans = [bundle.path(component.graph) for component in bundle.manifest.components]
    plans[0].write_bytes(b"\0plan")
    for plan in plans[1:]:
        plan.write_bytes(Stamp("a100", Precision.FP32, ()).name.encode())
    build = replace(bundle.manifest.build, target="h100", backend="tensorrt", profiles=())
    components = tuple(
        replace(component, graph=file_entry(bundle.folder, plan))
        for component, plan in zip(bundle.manifest.components, plans, strict=True)
    )
    write_manifest(bundle.folder, replace(bundle.manifest, components=components, build=build))
    arguments = (verb, bundle.folder, *([tmp_path / "out"] if verb == "pack" else []))
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert f"{plans[1].name} was built for target a100 | expected h100" in refused.stderr
    write_manifest(bundle.folder, replace(bundle.manifest, components=components, build=replace(build, target="a100")))
    accepted = run(*arguments)
    assert accepted.exit_code == 0
    assert f"{plans[0].name}: no word in clear of what they were built for" in accepted.stdout


@pytest.mark.parametrize("verb", ["verify", "pack"])
def test_a_folder_that_is_no_bundle(tmp_path, verb):
    result = run(verb, tmp_path, *([tmp_path / "out"] if verb == "pack" else []))
    assert result.exit_code == 2
    assert "is no bundle" in result.stderr
