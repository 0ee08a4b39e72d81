"""``--weights external``: both experts share one engine, each has a weights file, the VAE keeps embedded weights."""

import json

import pytest

from engines.build import BuildOptions, build_engines, disk_bytes
from engines.inspect.inspection import inspect_engines
from engines.targets import target_named
from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.built_for import check_plans
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.shapes import own_profiles
from wan22.specs import Precision
from wan22.stamp import Stamp, read_name

TINY = "t2v-a14b-tiny"


@pytest.mark.slow
def test_the_disk_is_priced_at_what_a_build_writes(external_engines):
    written = sum(path.stat().st_size for path in external_engines.rglob("*"))
    options = BuildOptions("rtx4090", weights="external")
    source = open_bundle(external_engines.parent / "b", "graphs")
    price = disk_bytes(source.manifest, target_named("rtx4090"), options)
    assert written < price < 1.5 * written


@pytest.mark.slow
def test_one_engine_for_both_experts(external_engines):
    folder, built = external_engines, open_bundle(external_engines, "engines", full_check=True)
    high, low = (built.component(f"{name}_noise") for name in ("high", "low"))
    assert high.graph == low.graph
    assert high.graph.path == "experts.plan"
    assert high.weights[0] == low.weights[0]
    assert [file.path for file in (high.weights[1], low.weights[1])] == ["high_noise.weights", "low_noise.weights"]
    assert high.weights[1].sha256 != low.weights[1].sha256
    assert built.component("text_encoder").weights[1].path == "text_encoder.weights"
    assert built.component("vae_decoder_next").weights == ()
    assert built.manifest.build.options["weights"] == "external"
    assert built.manifest.build.peak_rss_bytes > 10**8
    summaries = {report.component: report.summary() for report in inspect_engines(folder)}
    assert summaries["high_noise"]["kernels_per_block"] == summaries["low_noise"]["kernels_per_block"] > 5
    weights = {name: summary["weights"] for name, summary in summaries.items()}
    assert weights["high_noise"] == weights["low_noise"] == weights["text_encoder"] == "external"
    assert weights["vae_decoder_next"] == "embedded"


@pytest.mark.slow
def test_every_plan_says_what_it_was_built_for(external_engines):
    bundle = open_bundle(external_engines, "engines")
    build = bundle.manifest.build
    for component in bundle.manifest.components:
        stamp = Stamp("rtx4090", component.precision, own_profiles(build.profiles, component.inputs))
        assert read_name(bundle.path(component.graph)) == stamp.name, component.name
    assert check_plans(bundle) == ()


def test_no_external_weights_on_the_cpu(tmp_path, tiny_bundle):
    with pytest.raises(UserError, match="--weights external for target cpu"):
        build_engines(tiny_bundle, tmp_path / "e", BuildOptions("cpu", weights="external"))


def test_static_scales_are_refused_before_anything_is_compiled(tmp_path, tiny_checkpoint):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    (tmp_path / "scales.json").write_text(json.dumps({"blocks.0.ffn.net.0.proj": {"input_scale": 0.01}}))
    options = ExportOptions(Precision.FP8, input_scales=tmp_path / "scales.json")
    export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    seen = []
    with pytest.raises(UserError, match="export without --input-scales"):
        external = BuildOptions("rtx4090", "256x160", "5..17", weights="external")
        build_engines(tmp_path / "b", tmp_path / "e", external, lambda *call: seen.append(call))
    assert not seen and not (tmp_path / "e").exists()
