"""One block of the 14B models in its real size, with weights, from a checkpoint to an engine for an absent GPU."""

from dataclasses import replace

import pytest

from engines.build import BuildOptions, build_engines
from engines.inspect.inspection import inspect_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from tests.engines.inspect.test_log import check_block
from wan22.bundle import open_bundle
from wan22.precision import Precision
from wan22.specs import SPECS, T2V_A14B

TINY = SPECS["ti2v-5b-tiny"]  # one transformer and small parts around it
BLOCK_BYTES = 8 * 5120**2 + 2 * 5120 * 13824  # its matrices in FP8


@pytest.mark.slow
def test_it_goes_through_export_and_fp8_into_one_engine_of_fused_kernels(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    real = T2V_A14B.dit
    block = replace(TINY.dit, layers=1, width=real.width, ffn_width=real.ffn_width, heads=real.heads)
    synthesise(replace(TINY, dit=block), tmp_path / "checkpoint", "diffusers", seed=0, half=True)
    options = ExportOptions(Precision.FP8, parts=frozenset({"dit"}))
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "onnx", options)
    build_engines(tmp_path / "onnx", tmp_path / "engines", BuildOptions("rtx4090", "832x480", "81", topology="whole"))
    engine = open_bundle(tmp_path / "engines", "engines").component("dit")
    (report,) = inspect_engines(tmp_path / "engines")
    check_block(report, Precision.FP8)
    assert {kernel.dtype for kernel in report.typical_block if kernel.role == "gemm"} == {"fp8"}
    assert report.compiled.weights_bytes > BLOCK_BYTES
    assert engine.graph.size_bytes > BLOCK_BYTES
