"""What a video says about how it was made, and that it can be made again from it."""

import json

import av
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from runtime.recipe import Recipe, read_recipe
from runtime.request import Request
from runtime.video import TAG
from wan22 import version
from wan22.bundle import read_manifest
from wan22.errors import UserError
from wan_trt.cli import app

SMALL = ["--size", "64x48", "--frames", "5", "--steps", "2", "--seed", "5", "--shift", "3"]


def run(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.output


def frames(path):
    if path.suffix == ".png":
        return [np.asarray(Image.open(path))]
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.png"])
def test_a_video_is_made_again_from_its_metadata(tiny_engines, tmp_path, name):
    size = SMALL if name != "out.png" else [*SMALL, "--frames", "1"]
    prompt = 'a "fox" \x1b[31m 狐'
    run("generate", tiny_engines, prompt, "-o", tmp_path / name, *size, "--fps", 12, "--guidance", 2)
    recipe = read_recipe(tmp_path / name)
    assert (recipe.prompt, recipe.seed, recipe.steps, recipe.fps) == (prompt, 5, 2, 12)
    assert recipe.guidance == {"high_noise": 2, "low_noise": 2}
    assert recipe.wan_trt == version()
    assert recipe.bundle == read_manifest(tiny_engines, "engines").own_sha256
    again = tmp_path / f"again{(tmp_path / name).suffix}"
    run("generate", tiny_engines, "--again", tmp_path / name, "-o", again)
    assert len(frames(again)) == len(frames(tmp_path / name))
    np.testing.assert_array_equal(frames(again), frames(tmp_path / name))
    assert again.read_bytes() == (tmp_path / name).read_bytes()


def test_inspect_shows_it_without_terminal_codes(tiny_engines, tmp_path):
    run(
        "generate",
        tiny_engines,
        "red \x1b[31m",
        "-o",
        tmp_path / "a.png",
        "--size",
        "64x48",
        "--frames",
        1,
        "--steps",
        1,
    )
    shown = run("inspect", tmp_path / "a.png")
    assert "seed: 0" in shown
    assert "\x1b" not in shown
    assert json.loads(run("inspect", tmp_path / "a.png", "--json"))["prompt"] == "red \x1b[31m"


def test_an_image_and_noise_have_to_be_given_again(flow_of, tmp_path):
    engines = flow_of("ti2v-5b-tiny").engines
    y, x = np.mgrid[:64, :96]
    for name, shade in (("a.jpg", x), ("b.jpg", y)):
        Image.fromarray(np.stack([shade, x, y], -1).astype(np.uint8)).save(tmp_path / name)
    words = ["--size", "64x64", "--frames", 1, "--steps", 1]
    run("generate", engines, "x", "-o", tmp_path / "v.png", *words, "--image", tmp_path / "a.jpg")
    for image, told in ((["--image", tmp_path / "b.jpg"], "another image"), ([], "give its --image")):
        shown = run("generate", engines, "--again", tmp_path / "v.png", "-o", tmp_path / "w.png", *image, code=2)
        assert told in shown
    run("generate", engines, "--again", tmp_path / "v.png", "-o", tmp_path / "w.png", "--image", tmp_path / "a.jpg")
    assert (tmp_path / "w.png").read_bytes() == (tmp_path / "v.png").read_bytes()


RECIPE = Recipe("1", "m", "b", "x", "", (64, 48), 1, 16, 8, 5, "unipc", "official", {"high_noise": 1.0})


@pytest.mark.parametrize("other", [Request("y"), Request(seed=4), Request(steps=3), Request(size=(32, 32))])
def test_other_settings_beside_a_video_are_refused(other):
    with pytest.raises(UserError, match="--again with a prompt or settings"):
        RECIPE.request(other)


def test_noise_that_was_not_there_is_refused():
    with pytest.raises(UserError, match="another noise"):
        RECIPE.request(Request(noise=np.zeros((16, 1, 6, 8), np.float32)))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [("a.mp4", None, "No such file"), ("a.mp4", b"junk", "cannot be read"), ("a.png", b"junk", "a.png")],
)
def test_what_holds_no_recipe_is_refused(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    "text", [None, "{", '{"wan_trt": "\xf6', "[" * 100_000], ids=["none", "cut", "latin-1", "deep"]
)
def test_a_picture_of_somebody_else_is_refused(tmp_path, text):
    tags = PngInfo()
    if text is not None:
        tags.add_text(TAG, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=tags)
    with pytest.raises(UserError, match="no settings in its metadata"):
        read_recipe(tmp_path / "a.png")


def test_it_is_not_made_again_by_another_model(tiny_engines, flow_of, tmp_path):
    run("generate", tiny_engines, "red", "-o", tmp_path / "a.png", "--size", "64x48", "--frames", "1", "--steps", "1")
    other = flow_of("ti2v-5b-tiny").engines
    told = run("generate", other, "--again", tmp_path / "a.png", "-o", tmp_path / "b.png", code=2)
    assert "was made by t2v-a14b-tiny" in told


def test_a_quality_that_cannot_be_is_refused_before_the_work(tiny_engines, tmp_path):
    told = run("generate", tiny_engines, "red", "-o", tmp_path / "a.mp4", *SMALL, "--quality", "11", code=2)
    assert "quality 11 | expected 1 to 10" in told
    assert "denoise" not in told


def test_a_plan_takes_the_precision_of_its_target():
    assert "t2v-a14b-tiny, fp32, for cpu" in run("plan", "t2v-a14b-tiny", "--target", "cpu")


def test_a_later_part_of_a_file_of_weights_is_named_for_what_it_is(tmp_path):
    part = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    part.write_bytes(b"")
    assert "part 2 of 3 of one file of weights" in run("inspect", part)
