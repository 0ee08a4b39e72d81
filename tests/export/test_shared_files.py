"""With ``--link``, tensors in the graphs' dtype and shape are not copied: same bytes on disk, same results."""

import shutil

import numpy as np
import onnxruntime
import pytest

from export import shared_files
from export.exporter import export_checkpoint
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS

LINKED = ExportOptions(Precision.FP32, link=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "c"
    synthesise(SPECS["t2v-a14b-tiny"], folder, "diffusers", seed=0)
    return folder


def test_the_checkpoints_shards_are_the_bundles_weights(tmp_path, checkpoint):
    bundle = export_checkpoint(checkpoint, tmp_path / "b", LINKED)
    shards = sorted((checkpoint / "transformer").glob("*.safetensors"))
    files = [bundle.path(file) for file in bundle.component("high_noise").weights]
    assert [file.name for file in files] == [f"high_noise-{shard.name}" for shard in shards]
    assert all(file.samefile(shard) for file, shard in zip(files, shards, strict=True))
    open_bundle(tmp_path / "b", "graphs", full_check=True)


def test_a_linked_bundle_computes_what_a_copied_one_does(tmp_path, checkpoint, tiny_bundle):
    export_checkpoint(checkpoint, tmp_path / "b", LINKED)
    latents = np.random.default_rng(0).standard_normal((1, 16, 1, 4, 4), dtype=np.float32)
    linked, copied = (
        onnxruntime.InferenceSession(folder / "vae_decoder_first.onnx").run(["frames"], {"latents": latents})[0]
        for folder in (tmp_path / "b", tiny_bundle)
    )
    assert (linked == copied).all()


def test_only_what_needs_no_conversion_is_shared(tmp_path, checkpoint):
    bundle = export_checkpoint(checkpoint, tmp_path / "b", ExportOptions(Precision.BF16, link=True))
    assert [file.path for file in bundle.component("high_noise").weights] == ["high_noise.safetensors"]
    assert bundle.component("vae_decoder_first").weights[-1].path.startswith("vae_decoder-diffusion_pytorch_model")


def test_two_file_systems_cannot_share(tmp_path, checkpoint, monkeypatch):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(shared_files.os, "link", refused)
    monkeypatch.setattr(shared_files.fcntl, "ioctl", refused)
    with pytest.raises(UserError, match="leave out --link"):
        export_checkpoint(checkpoint, tmp_path / "b", LINKED)
    assert list(tmp_path.iterdir()) == []


def test_removing_a_linked_bundle_leaves_the_checkpoint(tmp_path, checkpoint):
    before = {path: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    export_checkpoint(checkpoint, tmp_path / "b", LINKED)
    shutil.rmtree(tmp_path / "b")
    assert before == {path: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
