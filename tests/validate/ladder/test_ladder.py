"""The ladder on real engines: all rungs pass, and a single wrong weight is located."""

import json
import math
import shutil
import struct

import numpy as np
import pytest

from engines.build import build_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from runtime.block_backend import BlockOptions
from runtime.request import Request
from runtime.solver import make_solver
from validate import ValidateOptions, validate
from validate.ladder.rungs import velocity_points
from validate.report.worst import FAILED, known, worst_values
from wan22.errors import NonFiniteError, UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.cli import app

SMALL = ValidateOptions(Request(size=(64, 64), frames=5, steps=4, seed=3))
SMALL_FLAGS = ["--size", "64x64", "--frames", "5", "--steps", "4", "--seed", "3"]


@pytest.fixture(scope="module")
def report(tiny_engines, tiny_checkpoint, tmp_path_factory):
    return validate(tiny_engines, tiny_checkpoint, tmp_path_factory.mktemp("report"), SMALL)


def test_engines_match_pytorch(report):
    assert [row.name for row in report.failed] == []
    assert report
    assert report.first_diverging_step is None
    assert all(row.seconds > 0 for row in report.rows)
    assert report.summary() == f"{len(report.rows)} of {len(report.rows)} checks passed"


def test_every_component_is_on_the_ladder(report):
    assert set(SPECS["t2v-a14b-tiny"].components) <= {row.component for row in report.rows}


def test_the_run_is_compared_after_every_step(report):
    assert [(row.step, row.component) for row in report.steps] == [
        (1, "high_noise"),
        (2, "high_noise"),
        (3, "high_noise"),
        (4, "low_noise"),
    ]
    assert all(0 < row.metrics.relative_l2 < 1e-3 for row in report.steps)


def test_frames_are_measured_in_decibels(report):
    video = next(row for row in report.rows if row.component == "video")
    assert video.metrics.psnr_db >= 60
    assert video.metrics.values == 3 * 5 * 64 * 64


def test_gates_know_what_a_ladder_measures_and_nothing_else(report):
    names, subjects = set(known()), {row.subject for row in report.rows}
    of_float32 = {name for name in names if name.partition(".")[0] in subjects and not name.endswith(".excess")}
    assert set(worst_values(report.rows)) == of_float32 | {FAILED}


def test_velocity_points_stay_with_their_expert():
    spec = SPECS["t2v-a14b"]
    for expert in spec.experts:
        points = velocity_points(spec, expert)
        assert len(points) == 4
        assert {spec.expert_at(t) for t in points} == {expert}
        assert all(np.float32(t) == t for t in points)
    assert velocity_points(spec, "high_noise")[-1] == 875
    assert velocity_points(SPECS["ti2v-5b"], "dit")[::3] == [999, 1]


def overwrite_one_weight(folder, name, value):
    """Set the first element of a float32 tensor, in place."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            if name in header:
                file.seek(8 + length + header[name]["data_offsets"][0])
                file.write(struct.pack("<f", value))
                return
    raise KeyError(name)


def test_one_wrong_weight_is_found_in_its_expert(tiny_engines, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    overwrite_one_weight(tmp_path / "checkpoint" / "low_noise_model", "head.head.bias", 1.5)
    arguments = ["validate", str(tiny_engines), str(tmp_path / "checkpoint"), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        app([*arguments, *SMALL_FLAGS])
    assert left.value.code == 1
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not found["passed"]
    assert found["first_diverging_step"] == 4
    failed = {row["component"] for row in found["rows"] if not row["passed"]}
    assert failed == {"low_noise", "video"}
    passed = {row["component"] for row in found["rows"] if row["passed"]}
    assert passed >= {"text_encoder", "high_noise", "vae_decoder_first", "vae_decoder_next"}


def test_a_wrong_solver_is_distinguished_from_a_wrong_transformer(tiny_engines, tiny_checkpoint, tmp_path, monkeypatch):
    euler = lambda _, schedule, seed: make_solver("euler", schedule, seed)  # noqa: E731
    monkeypatch.setattr("validate.ladder.engines_side.make_solver", euler)
    options = ValidateOptions(Request(size=(32, 32), frames=1, steps=4))
    found = validate(tiny_engines, tiny_checkpoint, tmp_path, options)
    assert [row.subject for row in found.failed] == ["solver"]


def test_a_nan_weight_in_the_reference_never_passes(tiny_engines, tiny_checkpoint, tmp_path, monkeypatch):
    from validate.reference.reference import Reference

    decode = Reference.decode
    monkeypatch.setattr(Reference, "decode", lambda self, latents: decode(self, latents) * np.float32(math.nan))
    found = validate(tiny_engines, tiny_checkpoint, tmp_path, SMALL)
    assert {row.component for row in found.failed} == {"vae_decoder_first", "vae_decoder_next", "video"}
    assert all("reference: " in row.metrics.problem for row in found.failed)


def test_our_run_that_stops_is_a_failure_with_its_reason(tiny_engines, tiny_checkpoint, tmp_path, monkeypatch):
    from validate.ladder.engines_side import EnginesSide

    velocity_of, calls = EnginesSide.run, []

    def dies(self, request):
        for step in velocity_of(self, request):
            yield step
            calls.append(step)
            if len(calls) == 2:
                raise NonFiniteError("velocity of high_noise in step 3 of 4")

    monkeypatch.setattr(EnginesSide, "run", dies)
    found = validate(tiny_engines, tiny_checkpoint, tmp_path, SMALL)
    assert [row.passed for row in found.steps] == [True, True, False, False]
    assert found.first_diverging_step.step == 3
    assert found.failed[-1].component == "video"
    assert {row.metrics.problem for row in found.failed} == {"velocity of high_noise in step 3 of 4"}


def test_engines_of_another_model_are_refused(tiny_engines, tmp_path):
    synthesise(SPECS["ti2v-5b-tiny"], tmp_path / "other", "official", seed=0)
    with pytest.raises(UserError, match=r"t2v-a14b-tiny.*expected ti2v-5b-tiny") as error:
        validate(tiny_engines, tmp_path / "other", tmp_path / "out", SMALL)
    assert str(tiny_engines) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tiny_engines, tiny_checkpoint, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="cannot write the report"):
        validate(tiny_engines, tiny_checkpoint, tmp_path / "out", SMALL)


@pytest.mark.slow
def test_fp16_engines_keep_the_limits_of_fp16_and_miss_those_of_fp32(tiny_checkpoint, tmp_path):
    from validate.ladder.thresholds import FP32

    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(Precision.FP16))
    build_engines(tmp_path / "onnx", tmp_path / "engines")
    found = validate(tmp_path / "engines", tiny_checkpoint, tmp_path / "out", SMALL)
    assert found
    velocities = [row for row in found.rows if row.name.startswith("velocity")]
    assert velocities
    assert not any(FP32.velocity.accepts(row.metrics) for row in velocities)
    vae = [row for row in found.rows if row.component.startswith("vae")]
    assert all(row.limit in (FP32.vae, FP32.streaming) for row in vae)  # the VAE stays in float32


@pytest.mark.slow
def test_a_decoder_in_16_bits_and_strips_shows_what_16_bits_cost(tiny_checkpoint, tmp_path):
    options = ExportOptions(Precision.FP32, {"vae_decoder": Precision.FP16})
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", options)
    build_engines(tmp_path / "onnx", tmp_path / "engines")
    asked = ValidateOptions(Request(size=(64, 64), frames=5, steps=1), blocks=BlockOptions(vae_strips=2))
    report = validate(tmp_path / "engines", tiny_checkpoint, tmp_path / "report", asked)
    assert [row.name for row in report.failed] == []
    rows = [row for row in report.rows if row.subject == "decode"]
    assert len(rows) == 3
    assert all("what fp16 costs beside float32" in row.note for row in rows)
    assert all(1e-5 < row.metrics.relative_l2 < 5e-3 for row in rows)
    assert all(0.5 < row.metrics.relative_l2 / row.in_precision.alone.relative_l2 < 2 for row in rows)
    assert all(row.in_precision is None for row in report.steps)


def test_the_first_nan_of_the_reference_is_named(tiny_engines, tiny_checkpoint, tmp_path, monkeypatch):
    from validate.reference.reference import Reference

    velocity, calls = Reference.velocity, []

    def breaks(self, expert, *inputs):
        calls.append(expert)
        found = velocity(self, expert, *inputs)
        return found * np.float32(math.nan) if len(calls) == 3 else found  # the second step, with the prompt

    monkeypatch.setattr(Reference, "velocity", breaks)
    found = validate(tiny_engines, tiny_checkpoint, tmp_path, SMALL)
    message = "reference: velocity of high_noise in step 2 of 4"
    assert found.first_not_finite.metrics.problem.startswith(message)
    assert message in found.summary()
    assert message in (tmp_path / "report.html").read_text()
