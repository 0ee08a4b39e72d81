"""A checkpoint of either layout becomes one self-contained bundle, or nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from export import exporter
from export.exporter import export_checkpoint
from export.files.safetensors_file import read_safetensors
from export.graphs.dit import dit_graph
from export.lora.merge import parse_lora
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from wan22.bundle import open_bundle, sha256_of
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS

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
        (ExportOptions(size=(64, 48)), "only one of --size and --frames"),
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
    with pytest.raises(UserError, match=r"1\.0 MiB free at .* expected [\d.]+ MiB for b"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_disk_is_told_as_such(tiny_checkpoint):
    with pytest.raises(UserError, match="cannot write /proc/b: /proc is not on a disk"):
        export_checkpoint(tiny_checkpoint, Path("/proc/b"))


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    for name in ("tokenizer.json", "spiece.model"):
        (tmp_path / "c" / "google" / "umt5-xxl" / name).unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        export_checkpoint(tmp_path / "c", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_fp8_stores_matrices_of_the_blocks_in_eight_bits_with_a_scale_for_each_row(
    tmp_path, tiny_checkpoint, tiny_bundle
):
    options = ExportOptions(Precision.FP8, keep_high_precision=frozenset({1}))
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    stored = read_safetensors(tmp_path / "b" / "high_noise.safetensors")
    full = read_safetensors(tiny_bundle / "high_noise.safetensors")
    in_fp8 = {name for name, tensor in stored.items() if tensor.dtype.itemsize == 1}
    leaves = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.kv", "cross_attn.o", "ffn.0", "ffn.2")
    assert in_fp8 == {f"blocks.0.{leaf}.weight" for leaf in leaves}
    scale = stored["blocks.0.ffn.0.weight_scale"].read()
    original = full["blocks.0.ffn.0.weight"].read()
    assert scale == pytest.approx(np.abs(original).max(1) / 448)
    restored = stored["blocks.0.ffn.0.weight"].read().astype(np.float32) * scale[:, None]
    assert (np.abs(restored - original).max(1) <= 16.001 * scale).all()  # half a step of E4M3 between 256 and 448
    assert (bundle.component("text_encoder").precision, bundle.component("high_noise").precision) == ("bf16", "fp8")
    assert "8 bits save memory only" in bundle.component("text_encoder").why_higher


def test_one_expert_may_have_a_precision_of_its_own(tmp_path, tiny_checkpoint):
    options = ExportOptions(Precision.FP8, {"high_noise": Precision.FP8_ATTN, "vae_decoder": Precision.FP16})
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    told = {c.name: c.precision.value for c in bundle.manifest.components}
    assert (told["high_noise"], told["low_noise"], told["vae_decoder_next"]) == ("fp8-attn", "fp8", "fp16")
    assert "blocks.0.self_attn.q_scale" in read_safetensors(tmp_path / "b" / "high_noise.safetensors")


@pytest.mark.parametrize(
    "precisions", [{"dit": Precision.FP8}, {"vae_encoder": Precision.BF16}, {"text_encoder": Precision.FP8_ATTN}]
)
def test_precisions_of_parts_that_make_no_sense(tmp_path, tiny_checkpoint, precisions):
    with pytest.raises(UserError, match=next(iter(precisions))):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.BF16, precisions))


@pytest.mark.parametrize(("precisions", "graphs"), [({}, 1), ({"high_noise": Precision.FP8}, 2)])
def test_a_graph_is_authored_once_for_experts_that_compute_alike(
    tmp_path, tiny_checkpoint, monkeypatch, precisions, graphs
):
    authored = []
    monkeypatch.setattr(exporter, "dit_graph", lambda *args: authored.append(dit_graph(*args)) or authored[-1])
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.BF16, precisions))
    assert len(authored) == graphs
    for expert in ("high_noise", "low_noise"):
        weights = ir.load(tmp_path / "b" / f"{expert}.onnx").graph.initializers.values()
        places = {v.const_value.location for v in weights if isinstance(v.const_value, ir.ExternalTensor)}
        assert places == {f"{expert}.safetensors"}


def test_loras_are_merged_and_recorded(tmp_path, tiny_checkpoint, tiny_bundle):
    lora, key = tmp_path / "style.safetensors", "blocks.0.ffn.0.weight"
    original = read_safetensors(tiny_bundle / "high_noise.safetensors")[key].read()
    save_file({f"diffusion_model.{key.removesuffix('.weight')}.diff": np.ones_like(original)}, lora)
    options = ExportOptions(Precision.FP32, loras=(parse_lora(f"{lora}@0.5:high"),))
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    high, low = (read_safetensors(tmp_path / "b" / f"{e}_noise.safetensors")[key].read() for e in ("high", "low"))
    assert (high == original + np.float32(0.5)).all()
    assert (low == read_safetensors(tiny_bundle / "low_noise.safetensors")[key].read()).all()
    record = bundle.manifest.loras[0]
    assert (record.strength, record.experts) == (0.5, ("high_noise",))
    assert record.sha256 == sha256_of(lora)


def test_a_lora_in_the_wrong_expert_warns(tmp_path, tiny_checkpoint, tiny_bundle, caplog):
    lora = tmp_path / "low_noise_model.safetensors"
    key = "blocks.0.ffn.0"
    shape = read_safetensors(tiny_bundle / "high_noise.safetensors")[f"{key}.weight"].shape
    save_file({f"{key}.diff": np.zeros(shape, np.float32)}, lora)
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(loras=(parse_lora(f"{lora}:high"),)))
    assert "merged into the high-noise expert" in caplog.text


def test_static_scales_enter_the_graph(tmp_path, tiny_checkpoint):
    (tmp_path / "scales.json").write_text(json.dumps({"blocks.0.ffn.net.0.proj": {"input_scale": 0.02}}))
    export_checkpoint(
        tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP8, input_scales=tmp_path / "scales.json")
    )
    stored = read_safetensors(tmp_path / "b" / "low_noise.safetensors")
    assert stored["blocks.0.ffn.0.input_scale"].read() == np.float32(0.02)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"blocks.99.ffn.net.2": {"input_scale": 1}}', r"blocks\.99"),
        ('{"blocks.0.ffn.net.2": {"input_scale": -1}}', "scale -1"),
        ('{"blocks.0.ffn.net.2": {}}', "another layout"),
        ("[", "JSON"),
        ("[]", "another layout"),
    ],
)
def test_scales_that_are_none(tmp_path, tiny_checkpoint, content, told):
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(UserError, match=told):
        export_checkpoint(
            tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP8, input_scales=tmp_path / "scales.json")
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("choice", ["self", "cross"])
def test_either_attention_may_stay_in_sixteen_bits(tmp_path, tiny_checkpoint, choice):
    options = ExportOptions(Precision.FP8_ATTN, fp8_attention=choice, keep_high_precision=frozenset({1}))
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    stored = read_safetensors(tmp_path / "b" / "low_noise.safetensors")
    scales = {f"blocks.0.{choice}_attn.{name}_scale" for name in "qk"}
    assert {name for name in stored if name.endswith((".q_scale", ".k_scale"))} == scales
    assert bundle.component("low_noise").why_higher == (
        f"requested: 16 bits in blocks 1; requested: only {choice}-attention in FP8"
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ExportOptions(Precision.FP8, keep_high_precision=frozenset({1, 2})),
            "--keep-high-precision 2 .* blocks 0 to 1",
        ),
        (
            ExportOptions(Precision.BF16, keep_high_precision=frozenset({1})),
            "--keep-high-precision without 8 or 4 bits",
        ),
        (ExportOptions(Precision.BF16, input_scales=Path("s.json")), "--input-scales without FP8"),
        (ExportOptions(Precision.FP32, input_means=Path("m")), "--input-means without 8 or 4 bits"),
        (ExportOptions(Precision.FP8, fp8_attention="self"), "--fp8-attention self without FP8 attention"),
        (ExportOptions(Precision.FP8, fp8_attention="both"), "--fp8-attention both without FP8 attention"),
        (
            ExportOptions(
                Precision.FP8_ATTN,
                {"high_noise": Precision.FP8, "low_noise": Precision.BF16},
                fp8_attention="cross",
            ),
            "--fp8-attention cross without FP8 attention: high_noise in fp8, low_noise in bf16",
        ),
    ],
)
def test_what_says_how_fp8_is_done_where_none_is_is_refused(tmp_path, tiny_checkpoint, options, told):
    with pytest.raises(UserError, match=told):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    assert not (tmp_path / "b").exists()
