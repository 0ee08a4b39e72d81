"""``wan-trt bundle``: verify finds one wrong byte, pack copies nothing that verify refuses."""

import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from wan22.bundle import file_entry, open_bundle, write_manifest
from wan22.precision import Precision
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
    assert f"{plans[0].name}: no readable build target" in accepted.stdout


@pytest.mark.parametrize("verb", ["verify", "pack"])
def test_a_folder_that_is_no_bundle(tmp_path, verb):
    result = run(verb, tmp_path, *([tmp_path / "out"] if verb == "pack" else []))
    assert result.exit_code == 2
    assert "is not a bundle" in result.stderr


def test_pack_copies_what_the_manifest_names_and_no_link_to_other_files(tmp_path, tiny_bundle):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    (tmp_path / "private").write_text("PRIVATE")
    (tmp_path / "b" / "linked.log").symlink_to(tmp_path / "private")
    (tmp_path / "b" / "notes.txt").symlink_to(tmp_path / "private")
    (tmp_path / "b" / "dit.log").write_text("of a builder")
    assert run("pack", tmp_path / "b", tmp_path / "packed").exit_code == 0
    manifest = open_bundle(tmp_path / "packed", "graphs", full_check=True).manifest
    packed = {
        path.relative_to(tmp_path / "packed").as_posix() for path in (tmp_path / "packed").rglob("*") if path.is_file()
    }
    assert packed == {*manifest.files(), "bundle.json", "dit.log"}


@pytest.mark.parametrize("verb", ["verify", "pack"])
def test_a_graph_that_reads_outside_of_the_bundle_is_refused(tmp_path, tiny_bundle, verb):
    import onnx

    folder = tmp_path / "b"
    shutil.copytree(tiny_bundle, folder)
    (tmp_path / "outer.bin").write_bytes(bytes(2**20))
    manifest, path = open_bundle(folder, "graphs").manifest, folder / "text_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../outer.bin" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    components = tuple(
        replace(c, graph=file_entry(folder, path)) if c.name == "text_encoder" else c for c in manifest.components
    )
    write_manifest(folder, replace(manifest, components=components))
    result = run(verb, folder, *([tmp_path / "packed"] if verb == "pack" else []))
    assert result.exit_code == 2
    assert "text_encoder.onnx reads '../outer.bin'" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "packed").exists()
