"""ONNX Runtime runs on what is there, CUDA before CPU."""

import numpy as np
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


def test_results_are_the_callers_own_and_inputs_may_be_views(tiny_engines):
    component = open_bundle(tiny_engines, "engines").component("text_encoder")
    ids = np.array([[5, 6], [7, 8]], np.int64)
    with OnnxRuntimeEngine(tiny_engines, component) as engine:
        first = engine(input_ids=ids[:1])
        kept = first.copy()
        column = engine(input_ids=ids.T[:1])
        again = engine(input_ids=np.array([[5, 7]], np.int64))
    assert np.array_equal(first, kept)
    assert np.array_equal(column, again)
    assert not np.array_equal(first, again)
