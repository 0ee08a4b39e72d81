"""A packed bundle is a complete copy that shares nothing; what is wrong with a bundle is not copied."""

import shutil

import pytest

from export.exporter import export_checkpoint
from export.options import ExportOptions
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan_trt.recipes.pack import pack


def test_a_packed_bundle_shares_no_file_with_the_checkpoint(tmp_path, tiny_checkpoint):
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP32, link=True))
    assert max(path.stat().st_nlink for path in (tmp_path / "b").iterdir() if path.is_file()) > 1
    seen = []
    packed = pack(tmp_path / "b", tmp_path / "packed", progress=lambda *call: seen.append(call))
    assert packed.manifest == open_bundle(tmp_path / "b", "graphs").manifest
    assert seen[-1][1] == seen[-1][2] > 10**6
    assert {path.stat().st_nlink for path in (tmp_path / "packed").iterdir() if path.is_file()} == {1}
    assert open_bundle(tmp_path / "packed", "graphs", full_check=True).manifest.spec.name == "t2v-a14b-tiny"


def test_a_bundle_with_a_wrong_byte_is_not_copied(tmp_path, tiny_bundle):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    with (tmp_path / "b" / "low_noise.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(UserError, match=r"low_noise\.safetensors"):
        pack(tmp_path / "b", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_packed_bundle_can_be_packed_over_an_earlier_one_only_when_asked(tmp_path, tiny_bundle):
    pack(tiny_bundle, tmp_path / "packed")
    with pytest.raises(UserError, match="--overwrite"):
        pack(tiny_bundle, tmp_path / "packed")
    pack(tiny_bundle, tmp_path / "packed", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
