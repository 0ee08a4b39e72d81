"""What a client makes of addresses, requests and servers that are not there; no server takes part."""

from dataclasses import fields, replace

import numpy as np
import pytest

from runtime.request import Request
from triton_repo.client import WanClient
from triton_repo.client_errors import JobError, address_of
from triton_repo.failure import Failure
from triton_repo.schema import INPUTS_BY_NAME
from triton_repo.server import free_ports
from triton_repo.wire import cache_inputs, inputs_of
from wan22.caching import Caching
from wan22.errors import UserError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("localhost", "localhost:8001"),
        ("localhost:9001", "localhost:9001"),
        ("http://localhost", "localhost:8001"),
        ("http://localhost:9001/", "localhost:9001"),
        ("grpc://10.0.0.7:9001", "10.0.0.7:9001"),
        ("[::1]", "[::1]:8001"),
        ("[::1]:9001", "[::1]:9001"),
    ],
)
def test_an_address_has_a_scheme_or_not_and_a_port_or_not(url, address):
    assert address_of(url) == address
    assert WanClient(url).url == address


@pytest.mark.parametrize("url", ["", ":8001", "localhost:port", "localhost:99999", "https://localhost", "localhost/v2"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match=r"expected host and port of a server, such as localhost:8001"):
        WanClient(url)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_server_that_is_not_there_is_named_with_what_to_check(scheme):
    (port,) = free_ports(1)
    with WanClient(f"{scheme}localhost:{port}") as client, pytest.raises(JobError) as error:
        client.submit(Request("x")).result()
    assert error.value.status == "UNAVAILABLE"
    assert error.value.reason.found == f"no answer from localhost:{port}"
    assert "gRPC port (8001 by default)" in error.value.reason.expected
    assert error.value.reason.remedy.startswith("is a server running?")


NOT_SERVED = {"exact_official": True, "schedule": "diffusers"}
FULL = Request(
    prompt="a fox",
    negative_prompt="a dog",
    size=(640, 360),
    frames=13,
    image=b"first",
    last_image=b"last",
    fit="crop",
    seed=11,
    noise=np.ones((16, 1, 8, 8), np.float32),
    preset="lightning",
    boundary=0.75,
    steps=7,
    shift=2.5,
    guidance={"high_noise": 3.25, "low_noise": 4.25},
    guidance_scale=1.75,
    solver="euler",
    lora="style",
    written="fox",
    extended_by="a model",
    cache=Caching(skip_steps=(3, 4), reuse="hold", late_cfg=(5,)),
)


def test_every_field_of_a_request_goes_over_the_wire_or_is_refused():
    sent = inputs_of(FULL)
    assert sent.keys() <= INPUTS_BY_NAME.keys()
    bare = Request(image=b"another")  # without an image there is nothing to fit
    empty = inputs_of(bare)
    for field in fields(Request):
        if field.name in NOT_SERVED:
            with pytest.raises(UserError, match="expected neither"):
                inputs_of(replace(FULL, **{field.name: NOT_SERVED[field.name]}))
        elif field.name == "terms":  # a part of the prompt
            assert inputs_of(replace(FULL, terms=("Orbit shot",))) == {**sent, "prompt": "Orbit shot. a fox"}
        else:
            alone = inputs_of(replace(bare, **{field.name: getattr(FULL, field.name)}))
            changed = {name: value for name, value in alone.items() if value != empty[name]}
            assert changed.items() <= sent.items()
            assert changed, field.name


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (Caching(True, 0.1, skip_steps=(11, 12), reuse="hold"), {"skip_steps": "11,12", "reuse": "hold"}),
        (Caching(True, 0.1, skip_steps=(), reuse="hold", late_cfg=(9,)), {"late_cfg": "9"}),
        (Caching(skip_steps=(), late_cfg=()), {}),
    ],
)
def test_of_a_recorded_run_the_lists_alone_are_sent_and_no_empty_one(recorded, expected):
    sent = cache_inputs(Request("x", cache=recorded))
    assert {name: value for name, value in sent.items() if value is not None} == expected


def test_an_image_file_is_sent_as_its_content(tmp_path):
    (tmp_path / "first.png").write_bytes(b"pixels")
    assert inputs_of(replace(FULL, image=tmp_path / "first.png"))["image"] == b"pixels"
    with pytest.raises(UserError, match=r"none\.png: No such file"):
        inputs_of(replace(FULL, image=tmp_path / "none.png"))


def test_strangers_are_told_inputs_and_not_options():
    error = UserError("99 frames", "5 frames", "use --frames 5, --negative-prompt and --fit crop, or another --size")
    failure = Failure.of(error)
    assert failure.remedy == "use num_frames 5, negative_prompt and fit crop, or another width and height"
    assert failure.message == f"99 frames | expected 5 frames | {failure.remedy}"
    assert (failure.event()["code"], failure.event()["found"]) == ("INVALID_ARGUMENT", "99 frames")


def test_strangers_are_not_told_to_run_a_command():
    error = UserError("128x64 (in latents)", "64x64", "run wan-trt build with a --size and --frames that cover it")
    assert Failure.of(error).remedy == "request a setting that this server supports"


def test_a_refusal_repeats_only_the_beginning_of_a_request():
    assert len(Failure.of(UserError("x" * 10_000, "y" * 10_000, "z" * 10_000)).message) < 600
