"""The ladder of models that take images: every rung passes, and an error in the image path is found where it occurs."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from runtime.request import Request
from validate import ValidateOptions, validate
from validate.options import complete_request
from wan22.errors import UserError
from wan22.specs import SPECS

REQUEST = Request(size=(64, 64), frames=5, steps=4, seed=3)
SMALL = ValidateOptions(REQUEST)


def png(width, height):
    colours = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def i2v(flow_of):
    return flow_of("i2v-a14b-tiny")


@pytest.fixture(scope="module")
def ti2v(flow_of):
    return flow_of("ti2v-5b-tiny")


@pytest.fixture(scope="module")
def report(i2v, tmp_path_factory):
    return validate(i2v.engines, i2v.checkpoint, tmp_path_factory.mktemp("report"), SMALL)


def names(rows):
    return [row.name for row in rows]


def test_image_to_video_matches_pytorch(report):
    assert names(report.failed) == []
    assert set(SPECS["i2v-a14b-tiny"].components) <= {row.component for row in report.rows}
    assert names(row for row in report.rows if row.component == "image") == [
        "pixels of the first image",
        "mask of the condition",
        "latents of the condition",
    ]
    assert report.facts["image"] == "built-in picture, 96x96, official fit"


def test_the_encoder_has_the_limits_of_the_decoder(report):
    encoder = [row for row in report.rows if row.component.startswith("vae_encoder")]
    decoder = [row for row in report.rows if row.component.startswith("vae_decoder")]
    assert [row.limit for row in encoder] == [row.limit for row in decoder]
    assert {row.limit.value for row in encoder} == {1e-4, 1e-5}


def test_a_last_image_and_another_shape(i2v, tmp_path):
    options = ValidateOptions(replace(REQUEST, image=png(150, 90), last_image=png(40, 80)))
    found = validate(i2v.engines, i2v.checkpoint, tmp_path, options)
    assert names(found.failed) == []
    assert "pixels of the last image" in names(found.rows)
    assert found.facts["video"] == "80x48, 5 frames"  # the shape of the first image


def test_the_5b_matches_in_both_modes(ti2v, tmp_path):
    options = ValidateOptions(replace(REQUEST, size=(96, 64), solver="euler"))
    found = validate(ti2v.engines, ti2v.checkpoint, tmp_path, options)
    assert names(found.failed) == []
    assert names(row for row in found.rows if row.component == "image") == [
        "pixels of the first image",
        "encoded image",
    ]
    text_mode = [row for row in found.rows if row.name.startswith("text mode")]
    assert [row.name.partition(", ")[2][:8] for row in text_mode] == ["velocity"] * 4 + ["latents "]
    image_mode = [row for row in found.rows if row.name.startswith("velocity at t")]
    alike = [a.metrics == b.metrics for a, b in zip(image_mode, text_mode, strict=False)]
    assert alike == [False] * 4
    assert {row.component for row in found.steps} == {"dit"}
    assert len(found.steps) == 4


def test_wrong_pixels_are_found_at_the_pixels(i2v, tmp_path, monkeypatch):
    from runtime.image_condition import fit_image

    def smooth(image, resizing, size, fit="official"):
        return fit_image(image.resize(size, Image.Resampling.LANCZOS), resizing, size, fit)

    for user in ("runtime.image_condition", "validate.ladder.engines_side"):
        monkeypatch.setattr(f"{user}.fit_image", smooth)
    found = validate(i2v.engines, i2v.checkpoint, tmp_path, SMALL)
    failed = names(found.failed)
    assert failed[:2] == ["pixels of the first image", "latents of the condition"]
    assert found.first_diverging_step.step == 1
    # given the reference's tensors, every engine is right
    assert not [row for row in found.failed if row.step is None and row.component not in ("image", "video")]


def test_a_wrong_mask_is_found(i2v, tmp_path, monkeypatch):
    import runtime.image_condition

    right = runtime.image_condition.conditioning_mask

    def one_channel(*shape, has_last=False):
        mask = right(*shape, has_last=has_last)
        mask[:, 1:] = 0
        return mask

    monkeypatch.setattr(runtime.image_condition, "conditioning_mask", one_channel)
    found = validate(i2v.engines, i2v.checkpoint, tmp_path, SMALL)
    assert names(found.failed)[0] == "mask of the condition"
    assert found.first_diverging_step.step == 1


def test_a_clean_first_frame_must_stay(ti2v, tmp_path, monkeypatch):
    """Only image mode has a separate timestep for the first frame."""
    import runtime.denoise

    inputs = runtime.denoise.step_inputs
    monkeypatch.setattr(
        runtime.denoise, "step_inputs", lambda dit, latents, t, clean_first_frame: inputs(dit, latents, t)
    )
    found = validate(ti2v.engines, ti2v.checkpoint, tmp_path, SMALL)
    assert found.first_diverging_step.step == 1
    assert not [row for row in found.failed if row.name.startswith("text mode")]


def test_an_image_of_another_shape_than_fixed_engines(i2v, tmp_path):
    from runtime.pipeline import Pipeline

    with Pipeline.open(i2v.engines) as pipeline:
        manifest = replace(pipeline.bundle.manifest, size=(64, 64, 5))
    assert complete_request(replace(REQUEST, size=None, frames=None), manifest).latent_shape == (1, 16, 2, 8, 8)
    with pytest.raises(UserError, match=r"80x48, 5 frames.*64x64, 5 frames.*--fit crop"):
        complete_request(replace(REQUEST, image=png(150, 90)), manifest)
    assert complete_request(replace(REQUEST, image=png(150, 90), fit="crop"), manifest).width == 64


@pytest.mark.slow
@pytest.mark.parametrize("model", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_the_diffusers_layout_matches_too(tmp_path, model):
    from engines.build import build_engines
    from export.exporter import export_checkpoint
    from export.options import ExportOptions
    from export.synth.checkpoint import synthesise
    from wan22.precision import Precision

    synthesise(SPECS[model], tmp_path / "checkpoint", "diffusers", seed=4)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "onnx", ExportOptions(Precision.FP32))
    build_engines(tmp_path / "onnx", tmp_path / "engines")
    found = validate(tmp_path / "engines", tmp_path / "checkpoint", tmp_path / "out", SMALL)
    assert names(found.failed) == []
    assert "diffusers layout" in found.facts["checkpoint"]
