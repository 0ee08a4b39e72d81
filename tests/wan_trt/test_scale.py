"""``wan-trt scale``: the figures of an export and of a build, on models of a size for tests."""

import json

import pytest
from typer.testing import CliRunner

from wan_trt.cli import app
from wan_trt.commands import scale
from wan_trt.scale_builds import BuildCase, measured_build


@pytest.mark.slow
def test_a_case_is_measured_beside_cp_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "CASES", scale.CASES[1:2])
    arguments = ["t2v-a14b-tiny", "--layers", "1", "--folder", str(tmp_path / "s"), "-o", str(tmp_path / "s.json")]
    told = CliRunner().invoke(app, ["scale", *arguments])
    assert told.exit_code in (0, 1), told.output  # whether a tiny model is quick enough says nothing
    (quantised,) = json.loads((tmp_path / "s.json").read_text())["cases"]
    dense = quantised["dense"]
    moved = dense["checkpoint_bytes"] + dense["bundle_bytes"]
    assert dense["export_gb_s"] == pytest.approx(moved / dense["export_seconds"] / 1e9)
    assert dense["cp_seconds"] == pytest.approx(sum(dense["cp_runs_seconds"]) / 2)
    assert dense["throughput_of_cp"] == pytest.approx(dense["export_gb_s"] / dense["cp_gb_s"])
    assert quantised["whole_sparse"]["peak_rss_bytes"] > 10**8
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.slow
def test_a_build_tells_time_memory_and_size_and_leaves_nothing(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    case = BuildCase("t2v-a14b-tiny", "rtx5090", "256x160", "17", "external", 4 * 10**9)
    found = measured_build(case, tmp_path)
    assert found["build_seconds"] > 0
    assert 10**8 < found["peak_rss_bytes"] < case.limit_bytes
    assert found["engine_bytes"]["experts.plan"] > 10**5
    assert set(found["kernels_per_block"]) == {"embedded", "external"}
    assert list(tmp_path.iterdir()) == []
