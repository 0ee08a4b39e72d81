"""Whole pipelines compile to real TensorRT-RTX engines on a machine without a GPU."""

from pathlib import Path

import pytest

from engines.build import BuildOptions, build_engines
from engines.disk_space import disk_bytes
from engines.targets import target_named
from export.exporter import export_checkpoint
from export.options import ExportOptions
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.strips import half_of

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle_of(flow_of, tmp_path_factory):
    """``bundle_of(model, precision)`` → an ONNX bundle."""
    made = {}

    def bundle(model, precision):
        if (model, precision) not in made:
            folder = tmp_path_factory.mktemp("onnx") / "bundle"
            export_checkpoint(flow_of(model).checkpoint, folder, ExportOptions(precision))
            made[model, precision] = folder
        return made[model, precision]

    return bundle


@pytest.mark.slow
@pytest.mark.parametrize(("target", "topology"), [("rtx4090", None), ("rtx5090", "whole")])
@pytest.mark.parametrize("model", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_all_components_of_a_model_compile(tmp_path, bundle_of, model, target, topology):
    options = BuildOptions(target, size="128x64..256x160", frames="5..17", topology=topology)
    built = build_engines(bundle_of(model, Precision.FP8), tmp_path / "engines", options)
    manifest = open_bundle(tmp_path / "engines", "engines", full_check=True).manifest
    whole = {name: f"{name}.plan" for name in manifest.spec.components}
    if topology is None:
        whole |= {"text_encoder": "text_encoder.layer.plan"}
        whole |= dict.fromkeys(manifest.spec.experts, f"{manifest.spec.experts[0]}.rest.plan")
        whole |= {name: f"{half_of(name)}_fine.plan" for name in whole if name.startswith("vae")}
        assert manifest.build.options["vae_strips"] == "8"
    assert {c.name: c.graph.path for c in manifest.components} == whole
    assert (manifest.build.target, manifest.build.backend) == (target, "tensorrt-rtx")
    assert manifest.build.profiles[0]["frames"] == (2, 5, 5)
    in_files = {"text_encoder", *manifest.spec.experts} if topology is None else set()
    assert {c.name for c in built.manifest.components if c.weights} == in_files
    written = sum(path.stat().st_size for path in built.folder.rglob("*"))
    graphs = open_bundle(bundle_of(model, Precision.FP8), "graphs").manifest
    price = disk_bytes(graphs, target_named(target), in_blocks=topology is None)
    assert written < price < 1.5 * written
    log = Path(whole[manifest.spec.experts[0]]).with_suffix(".log")
    assert (tmp_path / "engines" / log).stat().st_size > 0


@pytest.mark.slow
def test_fixed_shapes_and_fp8_attention_compile(tmp_path, flow_of):
    options = ExportOptions(Precision.FP8_ATTN, size=(128, 64), frames=5)
    export_checkpoint(flow_of("t2v-a14b-tiny").checkpoint, tmp_path / "onnx", options)
    manifest = build_engines(tmp_path / "onnx", tmp_path / "engines", BuildOptions("rtx4090")).manifest
    assert manifest.build.profiles[0]["height"] == (8, 8, 8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (BuildOptions("rtx3090"), "use --precision int8"),
        (BuildOptions("h100"), "pip install tensorrt"),
        (BuildOptions("rtx4090", size="100x100"), "size 100x100"),
        (BuildOptions("cpu"), "ONNX Runtime does not compute it"),
        (BuildOptions("rtx4090", timing_cache=Path("t")), "--timing-cache for rtx4090"),
    ],
    ids=["fp8 on ampere", "module missing", "size", "cpu", "timing cache"],
)
def test_what_a_target_cannot_do_is_told_before_any_work(tmp_path, bundle_of, options, told):
    with pytest.raises(UserError, match=told):
        build_engines(bundle_of("t2v-a14b-tiny", Precision.FP8), tmp_path / "engines", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_tf32_for_a_target_without_tensorrt_is_refused(tmp_path, bundle_of, target):
    bundle = bundle_of("t2v-a14b-tiny", Precision.FP32 if target == "cpu" else Precision.BF16)
    with pytest.raises(UserError, match=f"--tf32 for target {target}"):
        build_engines(bundle, tmp_path / "engines", BuildOptions(target, tf32=True))
    assert list(tmp_path.iterdir()) == []


def test_a_size_for_the_cpu_is_refused(tmp_path, tiny_bundle):
    with pytest.raises(UserError, match="its engines take every size"):
        build_engines(tiny_bundle, tmp_path / "engines", BuildOptions("cpu", size="64x64"))


@pytest.mark.slow
def test_a_failed_build_keeps_the_builders_log_and_no_engine(tmp_path, bundle_of, monkeypatch):
    from engines.gpu import tensorrt_backend

    def gives_up(self, stream):
        self.logger.errors.append("out of tactics")
        return False

    monkeypatch.setattr(tensorrt_backend._Build, "write", gives_up)
    with pytest.raises(UserError, match="out of tactics"):
        build_engines(bundle_of("t2v-a14b-tiny", Precision.FP8), tmp_path / "engines", BuildOptions("rtx4090"))
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder.layer.build.log"]
