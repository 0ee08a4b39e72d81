"""ONNX Runtime runs on what is there, CUDA before CPU."""

import onnxruntime
import pytest

from runtime.engine_onnxruntime import OnnxRuntimeEngine
from wan22.bundle import open_bundle


@pytest.mark.parametrize(
    "there", [["CPUExecutionProvider"], ["AzureExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]]
)
def test_cuda_is_used_where_onnxruntime_has_it(monkeypatch, tiny_engines, there):
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: asked.append(providers))
    component = open_bundle(tiny_engines, "engines").component("text_encoder")
    with OnnxRuntimeEngine(tiny_engines, component):
        pass
    assert asked == [[p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in there]]


def test_a_left_engine_holds_no_session(tiny_engines):
    component = open_bundle(tiny_engines, "engines").component("text_encoder")
    engine = OnnxRuntimeEngine(tiny_engines, component)
    with engine:
        assert engine._session is not None
    assert engine._session is None
