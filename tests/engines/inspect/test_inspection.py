"""Inspection of bundles and engines reports the fused kernels per component."""

import pytest

from engines.build import BuildOptions, build_engines
from engines.gpu.tensorrt_backend import log_beside
from engines.inspect.inspection import inspect_bundle, inspect_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from wan22.errors import UserError
from wan22.precision import Precision

pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")


@pytest.fixture(scope="module")
def graphs(flow_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "bundle"
    export_checkpoint(flow_of("t2v-a14b-tiny").checkpoint, folder, ExportOptions(Precision.FP8_ATTN))
    return folder


@pytest.fixture(scope="module")
def engines(graphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    build_engines(graphs, folder, BuildOptions("rtx4090", size="256x160", frames="5", topology="whole"))
    return folder


def test_a_bundle_is_compiled_to_be_looked_at(graphs):
    seen = []
    (report,) = inspect_bundle(
        graphs, "rtx5090", ("256x160", "5"), ["high_noise"], progress=lambda *call: seen.append(call)
    )
    assert (report.component, report.target.name, report.precision) == ("high_noise", "rtx5090", Precision.FP8_ATTN)
    assert report.by_dtype("attention") == {"fp8": 4}
    assert report.problems == []
    assert seen


def test_engines_are_inspected_by_their_logs(engines):
    reports = {report.component: report for report in inspect_engines(engines)}
    assert list(reports) == ["text_encoder", "high_noise", "low_noise", "vae_decoder_first", "vae_decoder_next"]
    assert reports["low_noise"].by_dtype("attention") == {"fp8": 4}
    assert reports["vae_decoder_next"].by_dtype("convolution")["fp32"] > 30
    assert [report.component for report in inspect_engines(engines, ["low_noise"])] == ["low_noise"]
    assert [problem for report in reports.values() for problem in report.problems] == []


def test_an_engine_whose_log_is_gone_is_asked_itself_and_that_takes_its_gpu(engines, tmp_path):
    lost = log_beside(engines / "low_noise.plan")
    kept = lost.read_bytes()
    lost.unlink()
    try:
        with pytest.raises(UserError, match=r"low_noise.plan has no builder log .* the engine's GPU"):
            inspect_engines(engines)
    finally:
        lost.write_bytes(kept)


def test_there_is_nothing_to_inspect_on_a_cpu(graphs, flow_of):
    with pytest.raises(UserError, match="target cpu"):
        inspect_bundle(graphs, "cpu")
    with pytest.raises(UserError, match="engines for ONNX Runtime"):
        inspect_engines(flow_of("t2v-a14b-tiny").engines)


def test_a_component_that_is_not_there_lists_those_that_are(graphs):
    with pytest.raises(UserError, match=r"component 'dit'.*one of text_encoder, high_noise"):
        inspect_bundle(graphs, "rtx4090", components=["dit"])
