"""A request's values as an order: what is computed from them, for each model, without a server."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gateway.api_error import ApiError
from gateway.body import canonical, read_body
from gateway.mlperf import benchmark_values
from gateway.order import Latents, make_order
from gateway.served import ServedModel
from triton_repo.settings import Limits
from wan22.bundle import Build, Manifest, Source
from wan22.precision import Precision
from wan22.specs import SPECS


def served(name, profiles=()):
    spec = SPECS[name]
    build = Build("rtx5090", "tensorrt", "10", "12.0", profiles, {}, 1.0)
    manifest = Manifest("engines", spec, Precision.FP8, (), (), Source("", "official", ""), "", build=build)
    return ServedModel(f"wan2.2-{name}", "wan22", manifest, Limits.of(spec))


def order(name="t2v-a14b", profiles=(), **fields):
    return make_order(canonical({"prompt": "x", **fields}), served(name, profiles))


def echo(name="t2v-a14b", **fields):
    return order(name, **fields).echo


def png(size=(640, 480)):
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("model", "fields", "frames", "fps", "seconds"),
    [
        ("t2v-a14b", {}, 81, 16, "5"),
        ("t2v-a14b", {"seconds": "5"}, 81, 16, "5"),
        ("t2v-a14b", {"seconds": 4}, 65, 16, "4"),
        ("t2v-a14b", {"seconds": "2.5", "fps": "8"}, 21, 8, "2.5"),
        ("t2v-a14b", {"num_frames": 81, "seconds": "5"}, 81, 16, "5"),
        ("ti2v-5b", {"seconds": "5"}, 121, 24, "5"),
        ("ti2v-5b", {}, 121, 24, "5"),
    ],
)
def test_seconds_become_frames_that_the_model_makes(model, fields, frames, fps, seconds):
    made = echo(model, **fields)
    assert (made["num_frames"], made["fps"], made["seconds"]) == (frames, fps, seconds)


@pytest.mark.parametrize(
    ("fields", "high", "low"),
    [
        ({}, 4.0, 3.0),
        ({"guidance_scale": 5}, 5.0, 5.0),
        ({"guidance_scale": 4.5, "guidance_scale_2": 2.5}, 4.5, 2.5),  # diffusers' order
        ({"guidance_low_noise": 2}, 4.0, 2.0),
    ],
)
def test_guidance_reaches_the_experts_that_it_names(fields, high, low):
    made = echo(**fields)
    assert (made["guidance_high_noise"], made["guidance_low_noise"]) == (high, low)


@pytest.mark.parametrize(
    ("model", "fields", "param", "told"),
    [
        ("ti2v-5b", {"size": "1280x720"}, "size", "1280x704"),
        ("ti2v-5b", {"guidance_scale": 5, "guidance_scale_2": 4}, "guidance_scale_2", "two experts"),
        ("t2v-a14b", {"num_frames": 80}, "num_frames", "81"),
        ("t2v-a14b", {"input_reference": b"x"}, "input_reference", "text only"),
        ("i2v-a14b", {}, "input_reference", "an image to start from"),
        ("i2v-a14b", {"input_reference": b"GIF89a"}, "input_reference", "a GIF"),
        ("i2v-a14b", {"input_reference": png((8000, 8000))}, "input_reference", "pixels"),
        ("t2v-a14b", {"steps": 1000}, "num_inference_steps", "at most 100"),
        ("t2v-a14b", {"solver": "magic"}, "solver", "unipc"),
        ("t2v-a14b", {"preset": "magic"}, "preset", "official"),
        ("t2v-a14b", {"lora": "ink"}, "lora", ""),
        ("t2v-a14b", {"cache": "hard"}, "cache", "easy"),
        ("t2v-a14b", {"cache": "easy", "steps": 4}, "cache", "at least 10"),
        ("t2v-a14b", {"steps": 40, "late_cfg": [38], "skip_steps": [38]}, "late_cfg", "each step in one list"),
        ("t2v-a14b", {"steps": 40, "reuse": "hold"}, "reuse", "cache or skip_steps"),
        ("t2v-a14b", {"preset": "lightx2v-4step", "guidance_scale": 3}, "preset", "leave the guidance out"),
        ("t2v-a14b", {"skip_steps": [1, 1]}, "skip_steps", "each step once"),
        ("t2v-a14b", {"width": 832}, "width", "both"),
        ("t2v-a14b", {"size": "832x480", "width": 832, "height": 480}, "size", "one of the two"),
        ("t2v-a14b", {"size": "big"}, "size", "WIDTHxHEIGHT"),
        ("t2v-a14b", {"seed": -1}, "seed", "expected 0"),
        ("t2v-a14b", {"output_format": "avi"}, "output_format", "mp4"),
        ("t2v-a14b", {"priority": 3}, "priority", "1"),
        ("t2v-a14b", {"timeout_seconds": 0}, "timeout_seconds", "more than 0"),
        ("t2v-a14b", {"fps": 100_000}, "fps", "240"),
        ("t2v-a14b", {"num_frames": 2**40}, "num_frames", "INT32"),
    ],
)
def test_what_the_model_does_not_make_is_refused_with_the_field(model, fields, param, told):
    with pytest.raises(ApiError) as error:
        order(model, **fields)
    assert (error.value.status, error.value.param) == (400, param)
    assert told in error.value.message
    assert "--" not in error.value.message  # options of a command line


def test_a_size_that_the_engines_lack_is_refused_with_those_they_have():
    sides = {"width": (104, 104, 104), "height": (60, 60, 60), "frames": (1, 21, 21)}
    with pytest.raises(ApiError) as error:
        order(profiles=(sides,), size="1280x720")
    assert "832" in error.value.message
    assert "480" in error.value.message
    assert order(profiles=(sides,)).echo["size"] == "832x480"


def test_an_images_shape_is_that_of_the_video_and_its_content_is_kept():
    made = order("i2v-a14b", size="832x480", input_reference=png((480, 480)), last_image=png())
    width, height = map(int, made.echo["size"].split("x"))
    assert width == height
    assert made.images == {"image": png((480, 480)), "last_image": png()}
    assert order("i2v-a14b", size="832x480", input_reference=png((480, 480)), fit="crop").echo["size"] == "832x480"


def test_an_order_has_every_input_that_repeats_it():
    fields = {"cache": "easy", "cache_threshold": 0.1, "negative_prompt": "", "quality": 5, "shift": 5, "boundary": 0.9}
    made = order(**fields)
    assert made.inputs.items() >= {**fields, "output_format": "mp4", "preview": False}.items()
    assert 0 <= made.inputs["seed"] < 2**32
    assert made.echo["seed"] == made.inputs["seed"]
    assert made.echo.items() >= {"cache": "easy", "negative_prompt": "", "flow_shift": 5.0}.items()


def test_mlperfs_request_is_the_benchmarks():
    model = served("t2v-a14b")
    values, wants_path = benchmark_values(
        {"prompt": "x", "negative_prompt": None, "response_format": "video_path"}, model
    )
    made = make_order(values, model).echo
    expected = {
        "size": "1280x720",
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 20,
        "seed": 42,
        "boundary": 0.875,
    }
    expected |= {"flow_shift": 3.0, "guidance_high_noise": 4.0, "guidance_low_noise": 3.0}
    assert expected.items() <= made.items()
    assert wants_path
    sent = {"prompt": "x", "size": "720x1280", "seconds": 5.0, "fps": 16, "num_inference_steps": 20, "seed": 42,
            "guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_frames": 81, "boundary_ratio": 0.875,
            "latent_path": "/data/fixed.pt", "output_format": "auto", "response_format": "video_path"}  # fmt: skip
    latents = Latents(
        {"fixed": np.zeros((1, 16, 21, 90, 160), np.float32).tobytes()}, {"fixed": Path("/data/fixed.pt")}
    )
    values, _ = benchmark_values(sent, model)
    made = make_order(values, model, latents=latents)
    assert expected.items() | {("latent", "fixed")} <= made.echo.items()
    assert "noise" not in made.inputs  # the queue has its name


FILE = b'--x\r\nContent-Disposition: form-data; name="look[]"; filename="a"\r\n\r\ny\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("application/json", rb'{"\ud800": 1}', "unknown_field"),
        ("application/json", rb'{"\ud800": 1, "\ud800": 2}', "duplicate_field"),
        ("application/json", rb'{"extra_body": {"\ud800": 1}}', "unknown_field"),
        ("application/json", b'{"seed": ' + b"9" * 400 + b"}", "invalid_type"),
        ("application/json", b'{"boundary": ' + b"9" * 400 + b"}", "invalid_type"),
        ("multipart/form-data; boundary=x", FILE, "invalid_type"),
    ],
)
def test_names_numbers_and_files_that_are_no_text_are_refused_in_utf8(kind, body, code):
    with pytest.raises(ApiError) as error:
        read_body(kind, body)
    assert error.value.code == code
    assert json.loads(error.value.response().body)["error"]["code"] == code


def test_a_name_of_many_megabytes_is_refused_at_once(monkeypatch):
    """Comparing it with the known names would take minutes."""
    monkeypatch.setattr("gateway.fields.get_close_matches", lambda name, *_, **__: pytest.fail(f"{len(name)}"))
    with pytest.raises(ApiError, match="unknown field"):
        read_body("application/x-www-form-urlencoded", b"a" * 10**7 + b"=1")
