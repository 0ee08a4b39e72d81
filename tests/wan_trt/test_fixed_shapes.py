"""Engines of graphs exported with --size and --frames: their video is the default, and any other is refused early."""

import av
import numpy as np
import pytest

from engines.build import build_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests.wan_trt.test_cli import refused, status
from triton_repo.job_request import parse_request
from triton_repo.loading import warm_up
from triton_repo.served_pipeline import ServedPipeline
from triton_repo.settings import Limits
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.specs import SPECS

FIXED = (128, 64, 9)
TOLD = r"expected 128x64, 9 frames, which the engines were built for"


@pytest.fixture(scope="module")
def fixed_of(flow_of, tmp_path_factory):
    """``fixed_of(model)`` → engines of fixed shapes."""

    def made(model):
        folder = tmp_path_factory.mktemp(model)
        export_checkpoint(flow_of(model).checkpoint, folder / "onnx", ExportOptions(size=FIXED[:2], frames=FIXED[2]))
        return build_engines(folder / "onnx", folder / "engines").folder

    return made


@pytest.fixture(scope="module")
def fixed(fixed_of):
    return fixed_of("t2v-a14b-tiny")


def test_the_default_video_is_that_of_the_graphs(fixed, tmp_path):
    output = tmp_path / "out.mp4"
    assert status(["generate", str(fixed), "x", "-o", str(output), "--steps", "2"]) == 0
    with av.open(str(output)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.width, stream.codec_context.height) == FIXED[:2]
        assert sum(1 for _ in file.decode(video=0)) == FIXED[2]


@pytest.mark.parametrize("options", [["--size", "256x160"], ["--frames", "17"], ["--size", "64x64", "--frames", "5"]])
def test_another_video_is_refused_in_one_line(fixed, tmp_path, capsys, options):
    line = refused(capsys, "generate", fixed, "x", "-o", tmp_path / "out.mp4", *options)
    assert "expected 128x64, 9 frames, which the engines were built for" in line
    assert not list(tmp_path.glob("out*"))


def test_another_video_is_refused_from_python_before_any_engine_is_opened(fixed):
    with Pipeline.open(fixed) as pipeline:
        with pytest.raises(UserError, match=TOLD):
            pipeline.complete(Request("x", frames=5))
        with pytest.raises(UserError, match=TOLD):
            next(iter(pipeline.denoise(Request("x").completed(pipeline.spec))))
        assert not pipeline._engines


def test_an_image_of_another_shape_is_told_about_cropping(fixed_of, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 128)).save(tmp_path / "tall.png")
    engines, image = fixed_of("ti2v-5b-tiny"), ["--image", tmp_path / "tall.png"]
    line = refused(capsys, "generate", engines, "x", "-o", tmp_path / "o.mp4", *image)
    assert "--fit crop makes exactly that size" in line
    words = ["generate", engines, "x", "-o", tmp_path / "o.mp4", *image, "--fit", "crop", "--steps", "1"]
    assert status(list(map(str, words))) == 0


def test_a_server_warms_up_and_answers_in_the_same_words(fixed):
    manifest = open_bundle(fixed, "engines").manifest
    with ServedPipeline(open_bundle(fixed, "engines")) as pipeline:
        warm_up(pipeline)
    limits = Limits.of(SPECS["t2v-a14b-tiny"])
    prompt = {"prompt": np.array([b"x"], np.object_)}
    asked = parse_request(prompt, manifest, limits).request
    assert (asked.width, asked.height, asked.frames) == FIXED
    with pytest.raises(UserError, match=TOLD):
        parse_request(prompt | {"num_frames": np.array([5], np.int32)}, manifest, limits)
