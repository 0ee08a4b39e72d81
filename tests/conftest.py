"""One tiny model goes through the whole flow once per session; tests of every room look at its folders."""

from pathlib import Path

import pytest

from wan22.specs import SPECS, Precision

TINY = "t2v-a14b-tiny"


@pytest.fixture(scope="session")
def flow(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="session")
def tiny_checkpoint(flow) -> Path:
    """A tiny T2V-A14B checkpoint in the official layout."""
    from export.synth import synthesise

    synthesise(SPECS[TINY], flow / "checkpoint", "official", seed=0)
    return flow / "checkpoint"


@pytest.fixture(scope="session")
def tiny_bundle(flow, tiny_checkpoint) -> Path:
    """Its ONNX bundle in fp32, dynamic shapes."""
    from export.exporter import ExportOptions, export_checkpoint

    export_checkpoint(tiny_checkpoint, flow / "onnx", ExportOptions(Precision.FP32))
    return flow / "onnx"


@pytest.fixture(scope="session")
def tiny_engines(flow, tiny_bundle) -> Path:
    """Its engines for target cpu."""
    from engines.build import build_engines

    build_engines(tiny_bundle, flow / "engines")
    return flow / "engines"
