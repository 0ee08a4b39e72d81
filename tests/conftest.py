"""Tiny models go through the whole flow once per session; tests of every room look at their folders."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from wan22.specs import SPECS, Precision

TINY = "t2v-a14b-tiny"


class Flow(NamedTuple):
    checkpoint: Path  # official layout
    bundle: Path  # fp32, dynamic shapes
    engines: Path  # target cpu


@pytest.fixture(scope="session")
def flow_of(tmp_path_factory) -> Callable[[str], Flow]:
    """``flow_of(name)`` → the folders of a tiny model, made on first use."""

    @cache
    def made(name: str) -> Flow:
        from engines.build import build_engines
        from export.exporter import export_checkpoint
        from export.options import ExportOptions
        from export.synth import synthesise

        root = tmp_path_factory.mktemp(name)
        flow = Flow(root / "checkpoint", root / "onnx", root / "engines")
        synthesise(SPECS[name], flow.checkpoint, "official", seed=0)
        export_checkpoint(flow.checkpoint, flow.bundle, ExportOptions(Precision.FP32))
        build_engines(flow.bundle, flow.engines)
        return flow

    return made


@pytest.fixture(scope="session")
def tiny_checkpoint(flow_of) -> Path:
    return flow_of(TINY).checkpoint


@pytest.fixture(scope="session")
def tiny_bundle(flow_of) -> Path:
    return flow_of(TINY).bundle


@pytest.fixture(scope="session")
def tiny_engines(flow_of) -> Path:
    return flow_of(TINY).engines
