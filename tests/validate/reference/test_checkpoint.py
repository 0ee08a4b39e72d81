"""The reference reads the boundary from the checkpoint itself, so a wrong one in a bundle is found."""

import json
import shutil
from dataclasses import replace

import pytest

from engines.build import build_engines
from export.checkpoint.checkpoint import open_checkpoint
from export.exporter import export_checkpoint
from export.synth.checkpoint import synthesise
from runtime.request import Request
from validate import ValidateOptions, validate
from validate.reference.checkpoint import expert_of, stated_boundary
from wan22.bundle import open_bundle, write_manifest
from wan22.specs import SPECS

# four official steps with shift 5: 999 937 833 624
SMALL = ValidateOptions(Request(size=(32, 32), frames=1, steps=4, shift=5.0, seed=3))
STATED = 0.95


@pytest.fixture(scope="module")
def diffusers_checkpoint(tmp_path_factory):
    """A -Diffusers checkpoint with a different boundary than its release."""
    folder = tmp_path_factory.mktemp("stated") / "checkpoint"
    synthesise(SPECS["t2v-a14b-tiny"], folder, "diffusers", seed=0)
    _state(folder, STATED)
    return folder


@pytest.fixture(scope="module")
def engines(diffusers_checkpoint):
    bundle, engines = (diffusers_checkpoint.parent / name for name in ("onnx", "engines"))
    export_checkpoint(diffusers_checkpoint, bundle)
    build_engines(bundle, engines)
    return engines


def _state(folder, boundary):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": boundary}))


def _experts(report):
    return [row.component for row in report.steps]


def test_engines_and_reference_read_the_boundary_independently(engines, diffusers_checkpoint, tmp_path):
    assert open_bundle(engines, "engines").manifest.spec.sampling.boundary == STATED
    report = validate(engines, diffusers_checkpoint, tmp_path, SMALL)
    assert [row.name for row in report.failed] == []
    assert _experts(report) == ["high_noise", "low_noise", "low_noise", "low_noise"]


def test_a_requested_boundary_holds_on_both_sides(engines, diffusers_checkpoint, tmp_path):
    report = validate(
        engines, diffusers_checkpoint, tmp_path, replace(SMALL, request=replace(SMALL.request, boundary=0.8))
    )
    assert [row.name for row in report.failed] == []
    assert _experts(report) == ["high_noise"] * 3 + ["low_noise"]


def test_a_wrong_boundary_in_the_bundle_fails_at_the_step_that_it_moves(engines, diffusers_checkpoint, tmp_path):
    shutil.copytree(engines, tmp_path / "engines")
    manifest = open_bundle(engines, "engines").manifest
    wrong = replace(manifest.spec, sampling=replace(manifest.spec.sampling, boundary=0.8))
    write_manifest(tmp_path / "engines", replace(manifest, spec=wrong))
    report = validate(tmp_path / "engines", diffusers_checkpoint, tmp_path / "report", SMALL)
    assert not report
    assert report.first_diverging_step.step == 2


@pytest.mark.parametrize(("boundary", "expected"), [(0.7, 0.7), (None, 0.875)])
def test_without_a_boundary_the_release_decides(diffusers_checkpoint, tmp_path, boundary, expected):
    shutil.copytree(diffusers_checkpoint, tmp_path / "checkpoint")
    _state(tmp_path / "checkpoint", boundary)
    assert stated_boundary(open_checkpoint(tmp_path / "checkpoint")) == expected


@pytest.mark.parametrize(("model", "expected"), [("i2v-a14b-tiny", 0.9), ("ti2v-5b-tiny", None)])
def test_the_official_layout_states_none(flow_of, model, expected):
    assert stated_boundary(open_checkpoint(flow_of(model).checkpoint)) == expected


def test_a_switch_by_step_goes_before_the_boundary():
    request = Request("x", size=(32, 32), frames=1, preset="nvfp4-sparse-4step").completed(SPECS["t2v-a14b-tiny"])
    timesteps = request.noise_schedule().timesteps.tolist()  # the third lies on the boundary
    experts = [expert_of(0.875, request, index, timestep) for index, timestep in enumerate(timesteps)]
    assert experts == ["high_noise", "high_noise", "low_noise", "low_noise"]
