"""Checks that a TensorRT-RTX engine of our graph builds, loads and runs on this GPU; not every architecture can."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.gpu.tensorrt_backend import EngineOptions, build_engine, load_module
from engines.profiles import profile_between
from engines.targets import TARGETS, Target
from export.checkpoint.schema import dit_tensors
from export.graphs.builder import BFLOAT16
from export.graphs.dit import dit_graph
from runtime.engine_tensorrt import Device
from runtime.forward_inputs import forward_inputs
from runtime.noise import standard_normal
from studies.gpu.random_model import random_weights, write_weights
from studies.gpu.stage import Measurement, StageSettings, reason_of
from studies.gpu.timing import median_ms
from wan22.component import Component, File
from wan22.precision import Precision
from wan22.specs import TEXT_TOKENS, ModelSpec, spec_named

VIDEO = (256, 160, 17)
RUNS = 20


def attempt(setting: StageSettings) -> Iterator[Measurement]:
    """Build the tiny transformer for this GPU, then try to load and run it. A refusal is a result too."""
    trt = load_module("tensorrt-rtx")
    spec, target = spec_named("t2v-a14b-tiny"), _target(setting)
    yield Measurement("version", note=str(trt.__version__))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = profile_between(spec, VIDEO, VIDEO)
        component = _graph(spec, folder, setting.seed)
        if not hasattr(trt.ComputeCapability, target.sm):
            yield Measurement("compiles for this GPU", note=f"no: TensorRT-RTX has no {target.sm}; tried one for Ada")
            target = TARGETS["rtx4090"]
        options = EngineOptions(target, (profile,), component.inputs)
        built = build_engine(folder / component.graph.path, folder / "transformer.plan", options)
        yield Measurement("built", built.seconds, "s", f"for {target.sm}, {built.size_bytes / 2**20:.0f} MiB")
        component = replace(component, graph=File("transformer.plan", "", built.size_bytes))
        if setting.dry_run:
            yield Measurement("loads", note="not tried: no GPU")
            return
        try:
            yield from _load_and_run(trt, folder, component, (profile,), spec)
        except Exception as error:
            yield Measurement("loads and runs", note=f"no: {reason_of(error)}")


def _target(setting: StageSettings) -> Target:
    """The target of a GeForce with the compute capability of this GPU."""
    target = TARGETS["rtx4090"]
    if setting.dry_run:
        return target
    major, minor = torch.cuda.get_device_capability()
    return replace(target, name="this GPU", compute_capability=f"{major}.{minor}")


def _graph(spec: ModelSpec, folder: Path, seed: int) -> Component:
    graph = dit_graph(spec.dit, BFLOAT16)
    write_weights([graph], random_weights(dit_tensors(spec.dit), "cpu", torch.float32, seed), folder)
    graph.save(folder / "transformer.onnx")
    inputs, outputs = graph.edges()
    return Component("transformer", File("transformer.onnx", "", 0), (), inputs, outputs, Precision.BF16)


def _load_and_run(
    trt: Any, folder: Path, component: Component, profiles: Any, spec: ModelSpec
) -> Iterator[Measurement]:
    import cupy

    latents = standard_normal(spec.latent_shape(*VIDEO), 0)
    text = standard_normal((1, TEXT_TOKENS, spec.dit.text_width), 1)
    inputs = {name: cupy.asarray(x) for name, x in forward_inputs(spec.dit, latents, 900.0, text).items()}
    with Device(trt, cupy) as device, device.engine(folder, component, profiles) as engine:
        velocity = cupy.asnumpy(engine(**inputs))
        finite = bool(np.isfinite(velocity).all())
        milliseconds = median_ms("cuda", lambda: engine(**inputs), RUNS)
    yield Measurement("loads and runs", milliseconds, "ms", "finite" if finite else "not finite")
