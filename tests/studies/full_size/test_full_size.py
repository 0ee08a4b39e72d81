"""``python -m studies.full_size``: the figures of an export and of a build, on models small enough for tests."""

import json

import pytest
from typer.testing import CliRunner

from export.checkpoint.checkpoint import open_checkpoint
from export.synth.checkpoint import synthesise
from studies.full_size.__main__ import app
from studies.full_size.builds import BuildCase, measure_build
from studies.full_size.repacked import repack
from wan22.specs import spec_named


def scaled(tmp_path, *arguments):
    """The command's result and the figures it wrote."""
    places = ["--folder", str(tmp_path / "s"), "-o", str(tmp_path / "s.json")]
    outcome = CliRunner().invoke(app, ["t2v-a14b-tiny", "--layers", "1", *places, *arguments])
    return outcome, json.loads((tmp_path / "s.json").read_text()) if outcome.exit_code in (0, 1) else {}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fp32 → fp8", "fp8_scaled → fp8"])
def test_an_export_and_cp_take_turns_and_nothing_is_left(tmp_path, case):
    outcome, figures = scaled(tmp_path, "--only", "throughput", "--case", case, "--repeats", "2")
    assert outcome.exit_code in (0, 1), outcome.output  # the speed of a tiny model means nothing
    (quantised,) = figures["throughput"]
    moved = quantised["checkpoint_bytes"] + quantised["bundle_bytes"]
    turns = list(zip(quantised["export_seconds"], quantised["cp_seconds"], strict=True))
    shares = [moved / export / (2 * quantised["checkpoint_bytes"] / cp) for export, cp in turns]
    assert len(turns) == 2
    assert quantised["shares_of_cp"] == pytest.approx(shares)
    assert quantised["share_of_cp"] == pytest.approx(sum(shares) / 2)
    assert 0 < quantised["sync_share"] < 1
    assert list((tmp_path / "s").iterdir()) == []
    assert set(figures) == {"model", "throughput"}


@pytest.mark.slow
def test_parts_that_are_measured_alone_end_in_one_file(tmp_path):
    scaled(tmp_path, "--only", "graph")
    for case in ("fp32 → fp8-attn", "linked"):
        outcome, figures = scaled(tmp_path, "--only", "memory", "--case", case)
        assert outcome.exit_code == 0, outcome.output
    assert figures["graph_seconds"] > 0
    assert [entry["case"] for entry in figures["memory"]] == ["fp32 → fp8-attn", "bf16 → bf16, linked"]
    assert all(10**8 < entry["peak_rss_bytes"] < 2 * 10**9 for entry in figures["memory"])
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "holds no figures"), ('{"model": "ti2v-5b"}', "has figures of ti2v-5b")]
)
def test_a_file_of_other_figures_is_not_overwritten(tmp_path, content, message):
    (tmp_path / "s.json").write_text(content)
    result, _ = scaled(tmp_path, "--only", "graph")
    assert (result.exit_code, (tmp_path / "s.json").read_text()) == (2, content)
    assert message in result.stderr


def test_an_unknown_case_is_refused_before_anything_is_written(tmp_path):
    result, _ = scaled(tmp_path, "--case", "fp5")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "--case 'fp5'" in result.stderr


def test_figures_that_cannot_be_written_are_reported_in_one_line(tmp_path):
    (tmp_path / "s.json").mkdir()
    result, _ = scaled(tmp_path, "--only", "graph")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_checkpoint_of_the_user_in_the_same_place_stays(tmp_path):
    theirs = tmp_path / "s" / "checkpoint" / "weights"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    outcome, _ = scaled(tmp_path, "--only", "memory", "--case", "fp16")
    assert outcome.exit_code == 0, outcome.output
    assert [path for path in (tmp_path / "s").rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "theirs"


@pytest.mark.slow
def test_a_build_reports_time_memory_and_size_and_leaves_nothing(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
    case = BuildCase("t2v-a14b-tiny", "rtx5090", "256x160", "17", "blocks", 4 * 10**9)
    found = measure_build(case, tmp_path)
    assert found["build_seconds"] > 0
    assert 10**8 < found["peak_rss_bytes"] < case.limit_bytes
    assert found["engine_bytes"]["high_noise.rest.plan"] > 10**5
    assert found["kernels_per_block"]["blocks"] == 18
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["fp8_scaled", "Q4_K"])
def test_repacked_sparse_experts_are_holes_of_the_checkpoints_shapes(tmp_path, form):
    spec = spec_named("t2v-a14b-tiny")
    synthesise(spec, tmp_path / "c", "official", 0, sparse=True)
    repack(tmp_path / "c", spec, form, sparse=True)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.spec == spec
    for expert in spec.experts:
        read = checkpoint.weights[expert].read("blocks.1.ffn.2.weight")
        assert (read.shape, float(abs(read).max())) == ((256, 512), 0.0)
        (path,) = {f for f in checkpoint.files if f.parent.name == f"{expert}_model"}
        assert path.name.startswith(form)


def test_repacked_experts_hold_the_weights_in_fp8(tmp_path):
    spec, name = spec_named("t2v-a14b-tiny"), "blocks.1.ffn.2.weight"
    synthesise(spec, tmp_path / "c", "official", 0, half=True)
    expected = open_checkpoint(tmp_path / "c").weights["low_noise"].read(name).astype("float32")
    repack(tmp_path / "c", spec, "fp8_scaled", sparse=False)
    weights = open_checkpoint(tmp_path / "c").weights["low_noise"]
    assert weights.codes(name) is not None
    assert abs(weights.read(name) - expected).max() <= abs(expected).max() / 16
