"""ComfyUI's remote sampler on a real server and through a real gateway."""

import io

import av
import numpy as np
import pytest

from runtime.generate import generate
from runtime.request import Request
from tests.comfyui.test_nodes import InterruptProcessingException, comfy, in_bytes  # noqa: F401
from tests.gateway.running import LONG
from wan22.errors import UserError


def inputs(comfy, **changed):  # noqa: F811
    """Inputs of the node with ComfyUI's defaults."""
    given = {}
    for name, (kind, *options) in comfy.nodes["WanTrtRemoteSampler"].INPUT_TYPES()["required"].items():
        given[name] = kind[0] if isinstance(kind, list) else options[0].get("default", "")
    small = {"prompt": "a fox", "width": 64, "height": 64, "frames": 5, "steps": 3, "seed": 5}
    return {**given, **small, **changed}


def test_the_remote_sampler_makes_what_generate_makes(comfy, triton, gateway, tiny_engines, tmp_path):  # noqa: F811
    sampler = comfy.nodes["WanTrtRemoteSampler"]()
    generate(tiny_engines, Request("a fox", size=(64, 64), frames=5, steps=3, seed=5), tmp_path / "made.npz")
    with np.load(tmp_path / "made.npz") as arrays:
        expected = arrays["frames"]
    (exact,) = sampler.generate(**inputs(comfy, server=triton.url))
    assert np.array_equal(in_bytes(exact), expected)
    assert [value for value, _, preview in comfy.bars if preview is not None] == [2, 3]
    fields = {"prompt": "a fox", "size": "64x64", "num_frames": 5, "steps": 3, "seed": 5, "quality": 10}
    film = gateway.ask("POST", "/v1/videos/sync", fields).body
    with av.open(io.BytesIO(film)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    before = gateway.ask("GET", "/v1/videos?limit=1").json["first_id"]
    (images,) = sampler.generate(**inputs(comfy, server=gateway.url))
    assert np.array_equal(in_bytes(images), expected)
    assert gateway.ask("GET", "/v1/videos?limit=1").json["first_id"] == before
    with pytest.raises(UserError, match="expected"):
        sampler.generate(**inputs(comfy, server=gateway.url, steps=1000))


def test_an_interruption_ends_the_job_at_the_gateway(comfy, triton, gateway):  # noqa: F811
    width, height = map(int, LONG["size"].split("x"))
    comfy.interrupt = lambda: len(comfy.bars) > 0
    long = {"width": width, "height": height, "frames": LONG["num_frames"], "steps": LONG["num_inference_steps"]}
    with pytest.raises(InterruptProcessingException):
        comfy.nodes["WanTrtRemoteSampler"]().generate(**inputs(comfy, server=gateway.url, **long))
    triton.wait_for("wan22_in_flight", 0)
