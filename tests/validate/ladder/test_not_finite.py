"""NaN on either side never passes, and the report names the first tensor."""

import json

import pytest
import torch

from runtime.request import Request
from validate import ValidateOptions, validate
from validate.reference import reference

SMALL = ValidateOptions(Request(size=(32, 32), frames=1, steps=2))
FIRST = [("text_encoder", "embeddings, prompt"), ("vae_encoder", "encode of the first frame")]


def check(found, folder, side, name):
    assert not found
    first = found.first_not_finite
    assert first.name == name
    assert f"first not finite: {name} (" in found.summary()
    assert first.metrics.problem.startswith(side)
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert {path.suffix for path in folder.iterdir()} == {".html", ".json", ".md", ".xml"}


@pytest.mark.parametrize(("component", "name"), [*FIRST, ("vae_decoder", "decode of the first latent")])
def test_nan_in_an_engine_is_reported(flow_of, with_nan, tmp_path, component, name):
    flow = flow_of("i2v-a14b-tiny")
    found = validate(with_nan(flow.engines, component), flow.checkpoint, tmp_path / "report", SMALL)
    check(found, tmp_path / "report", "ours: ", name)


@pytest.mark.parametrize(("component", "name"), FIRST)
def test_nan_in_the_reference_is_reported(flow_of, monkeypatch, tmp_path, component, name):
    load_part = reference.load_part

    def broken(checkpoint, part, progress):
        module = load_part(checkpoint, part, progress)
        if part == component.replace("vae_encoder", "vae"):
            torch.nn.init.constant_(next(module.parameters()), float("nan"))
        return module

    monkeypatch.setattr(reference, "load_part", broken)
    flow = flow_of("i2v-a14b-tiny")
    found = validate(flow.engines, flow.checkpoint, tmp_path, SMALL)
    check(found, tmp_path, "reference: ", name)
