"""An engine that computes NaN: times are shown, the verdict is no."""

import json

import numpy as np
import pytest

from runtime.engine_onnxruntime import OnnxRuntimeEngine
from validate.bench.measure import bench
from validate.bench.view import as_text
from validate.bench.work import EAGER, OURS, BenchOptions


@pytest.fixture
def broken_expert(monkeypatch):
    """One NaN in what the high-noise expert computes."""
    whole = OnnxRuntimeEngine.__call__

    def broken(engine, **inputs):
        result = whole(engine, **inputs)
        if engine.name == "high_noise":
            result[0, 0, 0, 0, 0] = np.nan
        return result

    monkeypatch.setattr(OnnxRuntimeEngine, "__call__", broken)


def test_nan_is_named_and_fails_the_bench(broken_expert, tiny_engines, tiny_checkpoint):
    options = BenchOptions(
        size=(32, 32), frames=1, steps=2, runs=1, whole_runs=1, memory=False, only=("text_encoder", "high_noise")
    )
    report = bench(tiny_engines, tiny_checkpoint, options)
    assert not report
    text, expert = report.result.pieces
    assert (text.not_finite, expert.not_finite) == ((), (OURS,))
    assert EAGER not in expert.difference
    assert "high_noise.relative_l2" not in report.result.measurements()
    first, second = report.result.faults
    assert first == "high_noise: NaN or infinity computed by ours"
    assert second.startswith("end_to_end: velocity of high_noise in step 1 of 2 (t = ")
    told = [part for part in as_text(report) if isinstance(part, str)]
    assert f"[red]✗ {first}[/]" in told
    assert json.dumps(report.as_json(), allow_nan=False)
