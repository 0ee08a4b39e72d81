"""``wan-trt bundle``: verify finds one wrong byte, pack makes a copy that shares nothing."""

import shutil

import pytest
from typer.testing import CliRunner

from export.exporter import export_checkpoint
from export.options import ExportOptions
from wan22.bundle import open_bundle
from wan22.specs import Precision
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


def test_a_packed_bundle_shares_no_file_with_the_checkpoint(tmp_path, tiny_checkpoint):
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP32, link=True))
    assert max(path.stat().st_nlink for path in (tmp_path / "b").iterdir() if path.is_file()) > 1
    assert run("pack", tmp_path / "b", tmp_path / "packed").exit_code == 0
    assert {path.stat().st_nlink for path in (tmp_path / "packed").iterdir() if path.is_file()} == {1}
    assert open_bundle(tmp_path / "packed", "graphs", full_check=True).manifest.spec.name == "t2v-a14b-tiny"


@pytest.mark.parametrize("verb", ["verify", "pack"])
def test_a_folder_that_is_no_bundle(tmp_path, verb):
    result = run(verb, tmp_path, *([tmp_path / "out"] if verb == "pack" else []))
    assert result.exit_code == 2
    assert "is no bundle" in result.stderr
