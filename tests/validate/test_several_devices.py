"""``validate`` and ``bench`` with several devices: they find what differs, and say what is gained."""

import json

import pytest

from runtime.block_backend import BlockOptions
from runtime.group_engine import GroupExpert
from runtime.request import Request
from validate.bench.scaling import bench_scaling
from validate.bench.work import BenchOptions
from validate.options import ValidateOptions
from validate.parallel import validate_parallel
from wan22.errors import UserError
from wan22.progress import silent
from wan_trt.cli import app

SMALL = Request(size=(64, 64), frames=5, steps=2)


def options_for(parallel):
    return ValidateOptions(SMALL, blocks=BlockOptions(parallel=parallel))


def test_devices_that_divide_guidance_are_equal_in_every_row(tiny_engines, tmp_path, capsys):
    words = ["--size", "64x64", "--frames", "5", "--steps", "2", "--gpus", "0,1", "--parallel", "cfg2"]
    with pytest.raises(SystemExit) as left:
        app(["validate", str(tiny_engines), *words, "-o", str(tmp_path / "report")])
    assert left.value.code == 0
    with pytest.raises(SystemExit) as left:
        app(["validate", str(tiny_engines), *words, "-o", str(tmp_path / "report")])
    assert left.value.code == 2
    assert "parallel.json exists | expected a folder without a report" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        app(["validate", str(tiny_engines), *words, "-o", str(tmp_path / "report"), "--overwrite"])
    assert left.value.code == 0
    found = json.loads((tmp_path / "report" / "parallel.json").read_text())
    assert {row["found"] for row in found["rows"]} == {0.0}
    names = {row["name"] for row in found["rows"]}
    assert {"velocity of low_noise, negative prompt", "latents after step 2", "video"} <= names
    assert "rows pass" in capsys.readouterr().out


def test_a_device_that_computes_something_else_fails_its_rows(tiny_engines, monkeypatch):
    forward = GroupExpert._forward

    def wrong(self, member, following, inputs):
        return forward(self, member, following, inputs) * (1 if member == 0 else 1 + 1e-6)

    monkeypatch.setattr(GroupExpert, "_forward", wrong)
    report = validate_parallel(tiny_engines, options_for("cfg2"))
    failed = {row.name for row in report.rows if not row.passed}
    assert not report
    assert failed == {*(f"latents after step {step}" for step in (1, 2)), "video"}


def test_divided_tokens_and_pictures_are_within_their_limits(divisible):
    report = validate_parallel(divisible("i2v-a14b-tiny", 4), options_for("ulysses2,vae2"))
    assert report, [row for row in report.rows if not row.passed]
    assert {row.limit.measure for row in report.rows} == {"max_abs", "relative_l2", "psnr_db"}


def test_one_device_has_nothing_to_compare(tiny_engines):
    alone = BlockOptions(gpus="0")
    with pytest.raises(UserError, match="several to compare with one"):
        validate_parallel(tiny_engines, ValidateOptions(SMALL, blocks=alone))
    with pytest.raises(UserError, match="several to compare with one"):
        bench_scaling(tiny_engines, BenchOptions(SMALL, blocks=alone), silent)


def test_the_bench_times_both_and_counts_what_a_step_exchanges(tiny_engines, capsys):
    words = ["--size", "64x64", "--frames", "5", "--runs", "1", "--parallel", "cfg2", "--json", "-"]
    with pytest.raises(SystemExit) as left:
        app(["bench", str(tiny_engines), *words])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["sent_per_step_bytes"] == 4 * 16 * 2 * 8 * 8
    assert found["speedup"] == pytest.approx(found["one_step_s"] / found["group_step_s"])
    assert found["scaling_efficiency"] == pytest.approx(found["speedup"] / 2)
