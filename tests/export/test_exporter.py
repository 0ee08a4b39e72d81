"""A checkpoint of either layout becomes one self-contained bundle, or nothing."""

import json
import shutil

import numpy as np
import onnx
import pytest

from export import exporter
from export.exporter import ExportOptions, export_checkpoint
from export.safetensors_file import read_safetensors
from export.synth import synthesise
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.specs import SPECS, Precision

FORBIDDEN = {"ScatterND", "ScatterElements", "NonZero", "Loop", "Scan", "If", "GatherND", "Resize"}
BF16 = ExportOptions(Precision.BF16)


def component(bundle, name):
    return open_bundle(bundle, "graphs").component(name)


def test_both_layouts_give_the_same_weights(tmp_path, tiny_bundle):
    synthesise(SPECS["t2v-a14b-tiny"], tmp_path / "diffusers", "diffusers", seed=0)
    export_checkpoint(tmp_path / "diffusers", tmp_path / "b")
    ours, theirs = (open_bundle(folder, "graphs").manifest for folder in (tiny_bundle, tmp_path / "b"))
    assert [c.weights for c in ours.components] == [c.weights for c in theirs.components]
    assert (ours.source.layout, theirs.source.layout) == ("official", "diffusers")


def test_the_manifest_says_what_the_bundle_is(tiny_bundle):
    manifest = open_bundle(tiny_bundle, "graphs").manifest
    assert manifest.spec == SPECS["t2v-a14b-tiny"]
    assert [c.name for c in manifest.components] == list(manifest.spec.components)
    assert len(manifest.source.fingerprint) == 64
    assert json.loads((tiny_bundle / "bundle.json").read_text())["precision"] == "fp32"


def test_no_graph_holds_an_operator_that_compiles_badly(tiny_bundle):
    for c in open_bundle(tiny_bundle, "graphs").manifest.components:
        model = onnx.load(tiny_bundle / c.graph.path, load_external_data=False)
        assert not FORBIDDEN & {node.op_type for node in model.graph.node}, c.name
        assert model.opset_import[0].version == 23
        onnx.checker.check_model(tiny_bundle / c.graph.path)


def test_edges_are_float32_in_every_precision(tmp_path, tiny_checkpoint):
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
    edges = [t for c in bundle.manifest.components for t in (*c.inputs, *c.outputs)]
    assert {t.dtype for t in edges if t.name != "input_ids"} == {"float32"}


def test_decoder_graphs_share_one_weights_file(tiny_bundle):
    first, following = (component(tiny_bundle, f"vae_decoder_{chunk}") for chunk in ("first", "next"))
    assert first.weights == following.weights
    assert len([t for t in following.inputs if t.name.startswith("cache_")]) == 32
    assert not [t for t in first.inputs if t.name.startswith("cache_")]


def test_the_vae_stays_in_float32_and_says_why(tmp_path, tiny_checkpoint):
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
    decoder, expert = bundle.component("vae_decoder_next"), bundle.component("high_noise")
    assert (decoder.precision, expert.precision) == (Precision.FP32, Precision.BF16)
    assert "colours" in decoder.why_higher
    assert expert.why_higher == ""


def test_weights_are_the_checkpoints_rounded_to_nearest(tmp_path, tiny_checkpoint, tiny_bundle):
    export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
    key = "blocks.1.ffn.0.weight"
    full, short = (
        read_safetensors(folder / "high_noise.safetensors")[key].read() for folder in (tiny_bundle, tmp_path / "b")
    )
    assert (full.astype(short.dtype) == short).all()


def test_fixed_shapes(tmp_path, tiny_checkpoint):
    options = ExportOptions(Precision.FP32, size=(64, 48), frames=9)
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    assert bundle.manifest.size == (64, 48, 9)
    assert bundle.component("low_noise").outputs[0].dims == (1, 16, 3, 6, 8)
    assert bundle.component("vae_decoder_next").outputs[0].dims == (1, 3, 4, 48, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (ExportOptions(size=(64, 48)), "--size without --frames"),
        (ExportOptions(size=(60, 48), frames=9), "size 60x48"),
        (ExportOptions(size=(64, 48), frames=8), "8 frames"),
    ],
)
def test_shapes_the_model_cannot_have_are_refused(tmp_path, tiny_checkpoint, options, told):
    with pytest.raises(UserError, match=told):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_a_nan_in_the_checkpoint_is_named_and_nothing_is_left(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    shard = next((tmp_path / "c" / "low_noise_model").glob("*-00002-of-*.safetensors"))
    key, stored = next(iter(read_safetensors(shard).items()))
    with shard.open("r+b") as file:
        file.seek(stored.offset)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(UserError, match=f"{key} holds NaN"):
        export_checkpoint(tmp_path / "c", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_earlier_bundle_is_kept_unless_told(tmp_path, tiny_checkpoint):
    export_checkpoint(tiny_checkpoint, tmp_path / "b")
    with pytest.raises(UserError, match="--overwrite"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", BF16)
    assert open_bundle(tmp_path / "b", "graphs").manifest.precision == Precision.FP32
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.BF16, overwrite=True))
    assert open_bundle(tmp_path / "b", "graphs").manifest.precision == Precision.BF16


def test_a_disk_too_small_is_told_before_any_work(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(UserError, match=r"0\.0 GiB free"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tokenizer_json_is_refused(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (tmp_path / "c" / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        export_checkpoint(tmp_path / "c", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
