"""A side that computes NaN: times are shown, the bench fails, and the tensor is named."""

import json

import pytest
import torch
from rich.text import Text

from runtime.request import Request
from validate.bench.measure import bench
from validate.bench.view import as_text
from validate.bench.work import EAGER, OURS, BenchOptions


def small(piece):
    return BenchOptions(Request(size=(32, 32), frames=1, steps=2), runs=1, whole_runs=1, memory=False, only=(piece,))


def faults_of(report):
    """The report's lines; all can be printed, and the JSON is standard."""
    assert not report
    assert json.dumps(report.as_json(), allow_nan=False)
    lines = [str(part) for part in as_text(report) if isinstance(part, str | Text)]
    assert [f"✗ {fault}" for fault in report.result.faults] == [line for line in lines if "✗" in line]
    return list(report.result.faults)


@pytest.mark.parametrize(
    ("piece", "first"),
    [
        ("text_encoder", "embeddings of the prompt: "),
        ("vae_encoder", "encoded image: "),
        ("high_noise", "velocity of high_noise in step 1 of 2 (t = "),
        ("vae_decoder", "frames of latent 1 of 1: "),
    ],
)
def test_nan_in_an_engine_is_named_and_fails_the_bench(flow_of, with_nan, piece, first):
    report = bench(with_nan(flow_of("i2v-a14b-tiny").engines, piece), None, small(piece))
    of_the_piece, of_the_run = faults_of(report)
    assert of_the_piece == f"{piece}: NaN or infinity computed by ours"
    assert of_the_run.startswith(f"end_to_end: {first}")
    (found,) = report.result.pieces
    assert (found.not_finite, found.samples[OURS].median > 0) == ((OURS,), True)


@pytest.mark.parametrize(
    ("part", "piece", "first"),
    [
        ("text_encoder", "text_encoder", "PyTorch's embeddings of the prompt: "),
        ("vae", "vae_encoder", "PyTorch's encoded image: "),
        ("low_noise", "low_noise", "PyTorch's latents of low_noise after step 2 of 2 (t = "),
    ],
)
def test_nan_in_pytorch_is_named_and_fails_the_bench(flow_of, monkeypatch, part, piece, first):
    from validate.bench import torch_side

    load_part = torch_side.load_part

    def broken(checkpoint, name, progress):
        module = load_part(checkpoint, name, progress)
        if name == part:
            torch.nn.init.constant_(next(module.parameters()), float("nan"))
        return module

    monkeypatch.setattr(torch_side, "load_part", broken)
    flow = flow_of("i2v-a14b-tiny")
    report = bench(flow.engines, flow.checkpoint, small(piece))
    of_the_piece, of_the_run = faults_of(report)
    assert of_the_piece == f"{piece}: NaN or infinity computed by eager"
    assert of_the_run.startswith(f"end_to_end: {first}")
    assert (report.result.pieces[0].not_finite, dict(report.result.pieces[0].difference)) == ((EAGER,), {})
    assert f"{piece}.relative_l2" not in report.result.measurements()
