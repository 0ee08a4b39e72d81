"""Bundles of graphs are validated in any precision, and the report says how their numbers were made."""

import json
from dataclasses import replace
from functools import cache

import pytest

from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.request import Request
from validate import ValidateOptions, validate
from validate.ladder.onnx_side import BY_KERNELS, BY_ROUNDING, how_made
from validate.ladder.thresholds import EXCESS, thresholds_for
from wan22.bundle import open_bundle
from wan22.precision import Precision

SMALL = ValidateOptions(Request(size=(32, 32), frames=5, steps=2, seed=3))


@pytest.fixture(scope="module")
def reported(tiny_checkpoint, tmp_path_factory):
    """``reported(precision)`` → the report of a bundle of graphs and its folder."""

    @cache
    def made(precision):
        root = tmp_path_factory.mktemp(precision)
        export_checkpoint(tiny_checkpoint, root / "onnx", ExportOptions(precision))
        return validate(root / "onnx", tiny_checkpoint, root / "report", SMALL), root

    return made


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_ATTN, Precision.INT8])
def test_a_bundle_of_graphs_keeps_the_limits_of_its_precision(reported, precision):
    found, _ = reported(precision)
    assert [row.name for row in found.failed] == []
    velocities = [row for row in found.rows if row.subject == "velocity" and row.limit is not EXCESS]
    assert {row.limit for row in velocities} == {thresholds_for(precision).velocity}
    assert {row.in_precision.precision for row in velocities} == {precision}


def test_every_row_says_how_it_was_made(reported):
    made = {row.component: row.made for row in reported(Precision.BF16)[0].rows}
    assert made["high_noise"] == made["video"] == BY_ROUNDING
    assert made["vae_decoder_next"] == BY_KERNELS
    assert made["tokenizer"] == ""


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_ATTN])
def test_the_export_loses_no_more_than_pytorch_in_that_precision(reported, precision):
    found = {row.component: row.metrics.excess for row in reported(precision)[0].rows if row.limit is EXCESS}
    assert set(found) == {"high_noise", "low_noise", "sampler"}
    assert all(0.1 < excess < 1.3 for excess in found.values())


def test_the_report_separates_precision_loss_from_export_error(reported):
    folder = reported(Precision.BF16)[1] / "report"
    rows = json.loads((folder / "report.json").read_text())["rows"]
    low = next(row["in_precision"] for row in rows if row["step"] == 2)
    assert low["precision"] == "bf16"
    assert 1e-5 < low["reference_alone"]["relative_l2"] < 8e-2
    assert 1e-5 < low["ours_against_it"]["relative_l2"] < 8e-2
    page = (folder / "report.html").read_text()
    assert "PyTorch in bf16: " in page
    assert "emulated by rounding" in page


def test_graphs_in_float32_need_no_second_reference(tiny_bundle, tiny_checkpoint, tmp_path):
    found = validate(tiny_bundle, tiny_checkpoint, tmp_path, SMALL)
    assert found
    assert all(row.in_precision is None for row in found.rows)


def test_built_engines_are_computed_by_kernels(reported):
    manifest = open_bundle(reported(Precision.BF16)[1] / "onnx", "graphs").manifest
    assert BY_ROUNDING in how_made(manifest).values()
    built = replace(manifest, kind="engines", build=object())
    assert set(how_made(built).values()) == {BY_KERNELS}
