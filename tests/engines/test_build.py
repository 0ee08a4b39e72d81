"""For target cpu an engine is the graph, proven to load, in a folder of its own."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from engines.build import BuildOptions, build_engines
from engines.disk_space import disk_bytes
from engines.targets import target_named
from export.exporter import export_checkpoint
from export.options import ExportOptions
from wan22.bundle import open_bundle, sha256_of
from wan22.errors import UserError
from wan22.precision import Precision


def test_the_manifest_says_what_built_it(tiny_engines):
    manifest = open_bundle(tiny_engines, "engines").manifest
    assert (manifest.build.target, manifest.build.backend) == ("cpu", "onnxruntime")
    assert manifest.build.seconds > 0


def test_engines_do_not_need_the_onnx_bundle_any_more(tmp_path, tiny_bundle):
    shutil.copytree(tiny_bundle, tmp_path / "onnx")
    build_engines(tmp_path / "onnx", tmp_path / "engines")
    shutil.rmtree(tmp_path / "onnx")
    bundle = open_bundle(tmp_path / "engines", "engines", full_check=True)
    assert len(bundle.manifest.components) == 5


def test_transformers_are_there_as_halves_too_and_belong_to_the_bundle(tiny_engines):
    manifest = open_bundle(tiny_engines, "engines").manifest
    halves = {c.name: [file.path for file in c.halves] for c in manifest.components if c.halves}
    assert halves == {name: [f"{name}.prompt.onnx", f"{name}.step.onnx"] for name in ("high_noise", "low_noise")}
    assert {path for paths in halves.values() for path in paths} <= manifest.files().keys()


def test_bfloat16_on_the_cpu_is_refused_with_the_way_out(tmp_path, tiny_checkpoint):
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(Precision.BF16))
    with pytest.raises(UserError, match=r"precision bf16 for cpu .* use --precision fp32"):
        build_engines(tmp_path / "onnx", tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("precision", "target", "found", "remedy"),
    [
        (Precision.FP8, "cpu", "precision fp8 for cpu", "in wan-trt export use --precision fp32, or name another"),
        (Precision.FP8, "rtx3090", "precision fp8 for rtx3090", "in wan-trt export use --precision int8"),
        (Precision.FP32, "rtx4090", "text_encoder in fp32 for rtx4090", "in wan-trt export use --text-encoder bf16"),
    ],
)
def test_a_target_refuses_the_precision_of_the_bundle_and_says_how_to_export(
    tmp_path, tiny_checkpoint, precision, target, found, remedy
):
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(precision))
    with pytest.raises(UserError) as refused:
        build_engines(tmp_path / "onnx", tmp_path / "engines", BuildOptions(target))
    assert str(refused.value).startswith(found)
    assert remedy in refused.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_part_of_another_precision_is_named(tmp_path, tiny_checkpoint):
    options = ExportOptions(Precision.FP32, {"low_noise": Precision.BF16})
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", options)
    with pytest.raises(UserError, match="low_noise in bf16 for cpu"):
        build_engines(tmp_path / "onnx", tmp_path / "engines")


def test_the_disk_is_priced_at_what_a_build_writes(tmp_path, tiny_bundle):
    price = disk_bytes(open_bundle(tiny_bundle, "graphs").manifest, target_named("cpu"), in_blocks=False)
    built = build_engines(tiny_bundle, tmp_path / "engines")
    written = sum(path.stat().st_size for path in built.folder.rglob("*"))
    assert 0.95 * price < written < 1.05 * price


def test_float16_on_the_cpu_loads(tmp_path, tiny_checkpoint):
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(Precision.FP16))
    assert build_engines(tmp_path / "onnx", tmp_path / "engines").manifest.precision == Precision.FP16


def test_an_edited_bundle_is_not_built(tmp_path, tiny_bundle):
    shutil.copytree(tiny_bundle, tmp_path / "onnx")
    weights = tmp_path / "onnx" / "low_noise.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"low_noise\.safetensors: sha256"):
        build_engines(tmp_path / "onnx", tmp_path / "engines")


def test_an_unknown_target_is_refused(tmp_path, tiny_bundle):
    with pytest.raises(UserError, match="target 'gtx1080'"):
        build_engines(tiny_bundle, tmp_path / "e", replace(BuildOptions(), target="gtx1080"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_the_order_of_sets_changes_no_byte(tmp_path, flow_of, model):
    """Of graphs and engines; manifests say how long a build took."""
    made = []
    for seed in ("1", "2"):
        bundle, engines = tmp_path / f"onnx{seed}", tmp_path / f"engines{seed}"
        environment = os.environ | {"PYTHONHASHSEED": seed}
        for words in (["export", flow_of(model).checkpoint, bundle, "--precision", "fp32"], ["build", bundle, engines]):
            program = [sys.executable, "-c", "from wan_trt.cli import main; main()"]
            subprocess.run([*program, *map(str, words)], env=environment, check=True)
        files = {path.relative_to(root): path for root in (bundle, engines) for path in root.rglob("*.*")}
        made.append({name: sha256_of(path) for name, path in files.items() if path.name != "bundle.json"})
    assert len(made[0]) > 10
    assert made[0] == made[1]
