"""``wan-trt build`` prints its time and memory, and the size of every engine."""

import pytest
from typer.testing import CliRunner

from wan22.bundle import open_bundle
from wan_trt.cli import app


@pytest.mark.parametrize(("weights", "topology"), [("external", "blocks"), ("embedded", "whole")])
def test_an_option_of_older_versions_names_the_one_that_has_its_place(tmp_path, weights, topology):
    told = CliRunner().invoke(app, ["build", str(tmp_path), str(tmp_path / "e"), "--weights", weights])
    assert told.exit_code == 2
    assert f"write --topology {topology}" in told.output.replace("\n", " ")


def test_time_memory_and_the_size_of_every_engine_are_told(tmp_path, tiny_bundle):
    told = CliRunner().invoke(app, ["build", str(tiny_bundle), str(tmp_path / "e")])
    assert told.exit_code == 0, told.output
    manifest = open_bundle(tmp_path / "e", "engines").manifest
    assert f"{manifest.build.seconds:.1f} s" in told.output
    assert f"{manifest.build.peak_rss_bytes / 2**30:.2f} GiB of memory" in told.output.replace("\n", " ")
    for component in manifest.components:
        assert component.graph.path in told.output
