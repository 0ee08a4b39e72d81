"""``--weights external``: both experts share one engine, each has its file of weights, the VAE keeps its own inside."""

import json
import statistics

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from engines.build import BuildOptions, build_engines, disk_bytes
from engines.inspect.inspection import inspect_engines
from engines.targets import target_named
from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.built_for import check_plans
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.shapes import own_profiles
from wan22.specs import SPECS, Precision
from wan22.stamp import Stamp, name_in
from wan_trt.cli import app

TINY = "t2v-a14b-tiny"


@pytest.fixture(scope="module")
def fp8_bundle(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("external") / "b"
    export_checkpoint(tiny_checkpoint, folder, ExportOptions(Precision.FP8))
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, fp8_bundle):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    folder = tmp_path_factory.mktemp("built") / "e"
    build_engines(fp8_bundle, folder, BuildOptions("rtx4090", "256x160", "5..17", weights="external"))
    return folder


@pytest.mark.slow
def test_the_disk_is_priced_at_what_a_build_writes(built, fp8_bundle):
    written = sum(path.stat().st_size for path in built.rglob("*"))
    options = BuildOptions("rtx4090", weights="external")
    price = disk_bytes(open_bundle(fp8_bundle, "graphs").manifest, target_named("rtx4090"), options)
    assert written < price < 1.5 * written


@pytest.mark.slow
def test_one_engine_for_both_experts(built):
    folder, built = built, open_bundle(built, "engines", full_check=True)
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
    kernels = built.manifest.build.kernels_per_block
    reports = inspect_engines(folder)
    assert {statistics.median_high(r.kernels_per_block) for r in reports if "noise" in r.component} == {
        kernels["external"]
    }
    assert abs(kernels["external"] - kernels["embedded"]) <= 4
    told = {report.component: report.weights for report in reports}
    both = f"external; kernels: {kernels['embedded']} per block embedded, {kernels['external']} per block external"
    assert told["high_noise"] == told["low_noise"] == both
    assert (told["text_encoder"], told["vae_decoder_next"]) == ("external", "embedded")


@pytest.mark.slow
def test_every_plan_says_what_it_was_built_for(built):
    bundle = open_bundle(built, "engines")
    build = bundle.manifest.build
    for component in bundle.manifest.components:
        stamp = Stamp("rtx4090", component.precision, own_profiles(build.profiles, component.inputs))
        assert name_in(bundle.path(component.graph)) == stamp.name, component.name
    assert check_plans(bundle) == ()


@pytest.mark.slow
def test_loras_make_new_weight_files_for_the_engine_that_is_there(tmp_path, tiny_checkpoint, fp8_bundle, built):
    lora, shape = tmp_path / "style.safetensors", (SPECS[TINY].dit.ffn_width, SPECS[TINY].dit.width)
    save_file({"diffusion_model.blocks.0.ffn.0.diff": np.full(shape, 0.1, np.float32)}, lora)
    told = CliRunner().invoke(
        app, ["lora", "apply", str(built), f"{lora}:high", "-o", str(tmp_path / "new" / "styled")]
    )
    assert told.exit_code == 0, told.output
    old, new = (open_bundle(folder, "engines", full_check=True) for folder in (built, tmp_path / "new" / "styled"))
    assert new.component("high_noise").graph == old.component("high_noise").graph
    assert new.component("high_noise").weights[1].sha256 != old.component("high_noise").weights[1].sha256
    assert new.component("low_noise").weights == old.component("low_noise").weights
    assert new.manifest.loras[0].experts == ("high_noise",)
    assert (tmp_path / "new" / "styled" / "experts.plan").samefile(built / "experts.plan")


@pytest.mark.slow
def test_loras_leave_blocks_and_attention_without_fp8_that_had_none(tmp_path, tiny_checkpoint):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    experts = frozenset({"high_noise", "low_noise"})
    options = ExportOptions(Precision.FP8_ATTN, fp8_attention="self", keep_high_precision=frozenset({1}), parts=experts)
    export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    build_engines(tmp_path / "b", tmp_path / "e", BuildOptions("rtx4090", "256x160", "5..17", weights="external"))
    lora, shape = tmp_path / "style.safetensors", (SPECS[TINY].dit.ffn_width, SPECS[TINY].dit.width)
    save_file({"diffusion_model.blocks.1.ffn.0.diff": np.full(shape, 0.1, np.float32)}, lora)
    told = CliRunner().invoke(app, ["lora", "apply", str(tmp_path / "e"), str(lora), "-o", str(tmp_path / "styled")])
    assert told.exit_code == 0, told.output
    old, new = (open_bundle(tmp_path / name, "engines", full_check=True) for name in ("e", "styled"))
    scales = {"blocks.0.self_attn.q_scale", "blocks.0.self_attn.k_scale"}
    assert new.manifest.build.attention_scales.keys() == old.manifest.build.attention_scales.keys() == scales
    assert new.component("low_noise").weights[1].size_bytes == old.component("low_noise").weights[1].size_bytes
    assert new.component("low_noise").weights[1].sha256 != old.component("low_noise").weights[1].sha256


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


@pytest.mark.slow
def test_a_lora_that_outgrows_the_scales_of_the_engine_is_refused(tmp_path, tiny_checkpoint):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    experts = frozenset({"high_noise", "low_noise"})
    export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP8_ATTN, parts=experts))
    build_engines(tmp_path / "b", tmp_path / "e", BuildOptions("rtx4090", "256x160", "5..17", weights="external"))
    lora, width = tmp_path / "norm.safetensors", SPECS[TINY].dit.width
    save_file({"diffusion_model.blocks.0.self_attn.norm_q.diff": np.full(width, 9, np.float32)}, lora)
    told = CliRunner().invoke(app, ["lora", "apply", str(tmp_path / "e"), str(lora), "-o", str(tmp_path / "new")])
    assert told.exit_code == 2
    assert "blocks.0.self_attn.q_scale" in told.output
    assert not (tmp_path / "new").exists()
