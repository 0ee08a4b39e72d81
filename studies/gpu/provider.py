"""Whether ONNX Runtime's CUDA provider loads, and whether it runs our attention as flash attention: kernel names."""

import json
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from engines.cuda.attention import fuse_attention
from export.graphs.attention import attention
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, GraphBuilder
from studies.gpu.random_model import opened
from studies.gpu.stage import Measurement, StageSettings, reason_of
from studies.gpu.timing import median_ms
from wan22.component import Component, File
from wan22.precision import Number, Precision

HEADS, HEAD, TOKENS, RUNS = 40, 128, 32_760, 5  # of T2V-A14B at 832x480, 81 frames
PRECISIONS = {Precision.BF16: BFLOAT16, Precision.FP16: FLOAT16}
FLASH = "flash"  # in the names of its kernels


def load(setting: StageSettings) -> Iterator[Measurement]:
    """Versions and providers, then attention over as many tokens as a video has, without a mask."""
    onnxruntime = import_module("onnxruntime")
    built_for = getattr(onnxruntime, "cuda_version", "") or "no CUDA"
    yield Measurement("ONNX Runtime", note=f"{onnxruntime.__version__}, for {built_for}")
    yield Measurement("providers", note=", ".join(onnxruntime.get_available_providers()))
    precisions = {Precision.FP32: FLOAT} if setting.dry_run else PRECISIONS
    for precision, dtype in precisions.items():
        try:
            yield from _attention(setting, precision, dtype)
        except Exception as error:  # a refusal is a result
            yield Measurement(f"attention {precision.value}", note=f"no: {reason_of(error)}")


def _attention(setting: StageSettings, precision: Precision, dtype: ir.DataType) -> Iterator[Measurement]:
    heads, tokens = (2, 64) if setting.dry_run else (HEADS, TOKENS)
    g = GraphBuilder("attention")
    q, k, v = (g.input(name, FLOAT, ["tokens", heads, HEAD]) for name in "qkv")
    y = attention(g, dtype, g.mul(q, g.constant(HEAD**-0.5, FLOAT)), k, v)
    g.output("y", g.cast(y, FLOAT), ["tokens", heads, HEAD])
    inputs, outputs = g.edges()
    rng = np.random.default_rng(setting.seed)
    given = {name: rng.standard_normal((tokens, heads, HEAD), dtype=np.float32) for name in "qkv"}
    with tempfile.TemporaryDirectory() as name:
        model = ir.Model(g.graph, ir_version=11)
        fuse_attention(model, heads, HEAD)
        ir.save(model, Path(name) / "attention.onnx")
        component = Component("attention", File("attention.onnx", "", 0), (), inputs, outputs, precision)
        with opened(Path(name), component, setting.device) as (engine, place):
            there = place(given)
            kernels = _kernels(lambda: engine(**there))
            milliseconds = median_ms(setting.device, lambda: engine(**there), RUNS)
    tflops = 4 * tokens**2 * heads * HEAD / milliseconds / 1e9
    yield Measurement(f"attention {precision.value}", milliseconds, "ms", f"{tokens} tokens, {heads} heads")
    yield Measurement(f"attention {precision.value}, rate", tflops, "TFLOP/s", str(Number(precision.attention)))
    flash = [kernel for kernel in kernels if FLASH in kernel.lower()]
    found = flash or kernels or ["none: no GPU"]
    verdict = "flash attention" if flash else "no flash attention"
    yield Measurement(f"attention {precision.value}, kernel", note=f"{verdict}: {found[0][:120]}")


def _kernels(work: Callable[[], object]) -> list[str]:
    """Names of the CUDA kernels of ``work``, of any library in this process, the longest first."""
    work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return [event["name"] for event in sorted(kernels, key=lambda event: -event["dur"])]
