"""``--weights external``: both experts share one engine, each has its file of weights, the VAE keeps its own inside."""

import pytest

from engines.build import BuildOptions, build_engines
from engines.inspection import inspect_engines
from export.exporter import ExportOptions, export_checkpoint
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.specs import Precision


@pytest.fixture(scope="module")
def fp8_bundle(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("external") / "b"
    export_checkpoint(tiny_checkpoint, folder, ExportOptions(Precision.FP8))
    return folder


@pytest.mark.slow
def test_one_engine_for_both_experts(tmp_path, fp8_bundle):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    options = BuildOptions("rtx4090", "256x160", "5..17", weights="external")
    build_engines(fp8_bundle, tmp_path / "e", options)
    built = open_bundle(tmp_path / "e", "engines", full_check=True)
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
    assert {tuple(r.kernels_per_block) for r in inspect_engines(tmp_path / "e") if "noise" in r.component} != set()


def test_no_external_weights_on_the_cpu(tmp_path, tiny_bundle):
    with pytest.raises(UserError, match="--weights external for target cpu"):
        build_engines(tiny_bundle, tmp_path / "e", BuildOptions("cpu", weights="external"))
