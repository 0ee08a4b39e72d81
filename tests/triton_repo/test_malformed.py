"""What strangers send: each of it is refused with a reason, and the server goes on serving."""

import contextlib
import io
import json
import queue
import socket
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from tests.triton_repo.serving import HANGS_S, SMALL, serving
from triton_repo.client_errors import JobError

LIMITS = {
    "max_pixels": 64 * 64,
    "max_frames": 9,
    "max_steps": 20,
    "max_image_bytes": 200_000,
    "max_image_pixels": 10**6,
    "max_raw_bytes": 60_000,
}
NUMPY = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "UINT8": np.uint8}


@pytest.fixture(scope="module")
def server(installation, flow_of, tmp_path_factory):
    engines = {"t2v": flow_of("t2v-a14b-tiny").engines, "i2v": flow_of("i2v-a14b-tiny").engines}
    with serving(installation, tmp_path_factory.mktemp("served"), engines, **LIMITS) as served:
        yield served
        with served.client("t2v") as client:  # after all that
            assert client.generate("x", **SMALL).video


def told(server, model, inputs):
    """The error that the server answers raw tensors with."""
    answers = queue.SimpleQueue()
    with grpc.InferenceServerClient(server.url) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        tensors = []
        for name, (dtype, values) in inputs.items():
            array = np.asarray(values, NUMPY[dtype])
            tensors.append(grpc.InferInput(name, list(array.shape), dtype))
            tensors[-1].set_data_from_numpy(array)
        client.async_stream_infer(model, tensors, enable_empty_final_response=True)
        result, error = answers.get(timeout=HANGS_S)
        client.stop_stream()
    assert isinstance(error, InferenceServerException), result.get_response()
    return error.message()


def text(value):
    return "BYTES", [value]


def int32(value):
    return "INT32", [value]


def fp32(value):
    return "FP32", [value]


def image(content):
    return "UINT8", np.frombuffer(content, np.uint8)


def png(width, height):
    """A whole PNG of one colour."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def bomb():
    """A PNG of 40 kB whose header promises 900 megapixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**7))), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SIZE = {"width": int32(64), "height": int32(64), "num_frames": int32(5), "steps": int32(2)}
PROMPT = {**SIZE, "prompt": text(b"x")}
BAD = [
    # text
    ("t2v", {**SIZE, "prompt": text(b"\xff\xfe bad")}, "prompt is not UTF-8"),
    ("t2v", {**SIZE, "prompt": text(b"")}, "prompt ''"),
    ("t2v", {**SIZE, "prompt": text(b" \n\t ")}, "prompt ' \\n\\t '"),
    ("t2v", {**SIZE, "prompt": text(b"a\0b")}, "NUL"),
    ("t2v", {**SIZE, "prompt": text(b"x" * 20_000)}, "prompt of 20000 bytes"),
    ("t2v", {**PROMPT, "negative_prompt": text(b"\xc3\x28")}, "negative_prompt is not UTF-8"),
    ("t2v", {}, "no prompt"),
    ("t2v", SIZE, "no prompt"),
    # names that might be paths
    ("t2v", {**PROMPT, "output_format": text(b"../../etc/passwd")}, "output_format '../../etc/passwd'"),
    ("t2v", {**PROMPT, "output_format": text(b"frames_npz")}, "frames of 61440 bytes"),
    ("t2v", {**PROMPT, "output_format": text(b"png")}, "5 frames as png"),
    ("t2v", {**PROMPT, "preset": text(b"/etc/passwd")}, "preset '/etc/passwd'"),
    ("t2v", {**PROMPT, "solver": text(b"$(reboot)")}, "solver '$(reboot)'"),
    ("t2v", {**PROMPT, "fit": text(b"x" * 1000)}, "fit of 1000 bytes"),
    # numbers
    ("t2v", {**PROMPT, "guidance": fp32(np.nan)}, "guidance nan"),
    ("t2v", {**PROMPT, "shift": fp32(np.inf)}, "shift inf"),
    ("t2v", {**PROMPT, "shift": fp32(-1)}, "shift -1"),
    ("t2v", {**PROMPT, "boundary": fp32(875)}, "boundary 875"),
    ("t2v", {**PROMPT, "boundary": fp32(-0.1)}, "boundary -0.1"),
    ("t2v", {**PROMPT, "guidance_low_noise": fp32(-3)}, "guidance -3"),
    ("t2v", {**PROMPT, "width": int32(-64)}, "size -64x64"),
    ("t2v", {**PROMPT, "width": int32(2**31 - 1), "height": int32(2**31 - 1)}, "pixels"),
    ("t2v", {**PROMPT, "width": int32(50)}, "size 50x64"),
    ("t2v", {"prompt": text(b"x"), "width": int32(64)}, "width without height"),
    ("t2v", {**PROMPT, "num_frames": int32(8)}, "8 frames"),
    ("t2v", {**PROMPT, "num_frames": int32(2**31 - 1)}, "2147483647 frames"),
    ("t2v", {**PROMPT, "steps": int32(0)}, "0 steps"),
    ("t2v", {**PROMPT, "steps": int32(1_000_000)}, "1000000 steps"),
    ("t2v", {**PROMPT, "fps": int32(0)}, "fps 0"),
    ("t2v", {**PROMPT, "fps": int32(100_000)}, "fps 100000"),
    ("t2v", {**PROMPT, "quality": int32(0)}, "quality 0"),
    ("t2v", {**PROMPT, "quality": int32(11)}, "quality 11"),
    ("t2v", {**PROMPT, "progress_every": int32(0)}, "progress_every 0"),
    ("t2v", {**PROMPT, "seed": ("INT64", [-1])}, "seed -1"),
    ("t2v", {**PROMPT, "deadline_unix_ms": ("INT64", [1])}, "a deadline in the past"),
    # types and shapes, which Triton itself refuses
    ("t2v", {**PROMPT, "steps": fp32(4)}, "data-type"),
    ("t2v", {**PROMPT, "steps": ("INT32", [4, 5])}, "shape"),
    ("t2v", {**PROMPT, "engines": text(b"/etc")}, "unexpected inference input 'engines'"),
    # images
    ("t2v", {**PROMPT, "image": image(png(64, 64))}, "an image for t2v-a14b-tiny"),
    ("i2v", PROMPT, "no image for i2v-a14b-tiny"),
    ("i2v", {**PROMPT, "image": image(b"")}, "unknown or damaged format"),
    ("i2v", {**PROMPT, "image": image(b"/etc/passwd")}, "unknown or damaged format"),
    ("i2v", {**PROMPT, "image": image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, "is an SVG"),
    ("i2v", {**PROMPT, "image": image(png(64, 64)[:60])}, "image"),
    ("i2v", {**PROMPT, "image": image(png(8, 8))}, "8x8 pixels"),
    ("i2v", {**PROMPT, "image": image(png(2000, 2000))}, "image of 4000000 pixels"),
    ("i2v", {**PROMPT, "image": image(bomb())}, "pixel"),
    ("i2v", {**PROMPT, "image": image(bytes(300_000))}, "image of 300000 bytes"),
]


@pytest.mark.parametrize(("model", "inputs", "reason"), BAD)
def test_it_is_refused_with_a_reason(server, model, inputs, reason):
    message = told(server, model, inputs)
    assert reason in message
    assert len(message) < 600
    assert "Traceback" not in message
    assert "--" not in message  # an option of a command that the client does not have


def test_a_refusal_is_counted_as_one_whatever_is_missing(server):
    before = server.metric("wan22_requests_total", "t2v", outcome="refused")
    for body in ({}, {"steps": 1}):
        request = urllib.request.Request(f"{server.http}/v2/models/t2v/generate", json.dumps(body).encode())
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=HANGS_S)
        assert error.value.code == 400
        assert "no prompt" in error.value.read().decode()
    assert server.metric("wan22_requests_total", "t2v", outcome="refused") == before + 2
    assert server.metric("wan22_requests_total", "t2v", outcome="failed") == 0


def test_a_refusal_reaches_the_client_with_a_code_and_in_parts(server):
    with server.client("i2v") as client, pytest.raises(JobError) as error:
        client.generate("x", **SMALL)
    assert error.value.status == "INVALID_ARGUMENT"
    assert error.value.reason.found == "no image for i2v-a14b-tiny"
    assert error.value.reason.expected == "an image to start from"
    assert error.value.reason.remedy == "give one with image"


def test_a_model_that_the_server_does_not_have_is_named(server):
    with server.client("wan23") as client, pytest.raises(JobError, match="wan23") as error:
        client.generate("x", **SMALL)
    assert error.value.status == "NOT_FOUND"


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_a_large_body_does_not_end_the_server(server, kind):
    """Of the second kind curl makes every body unless told otherwise."""
    body = json.dumps({"prompt": "x", **SMALL, "steps": 0}).encode() + b" " * (24 * 2**20)
    address = f"{server.http}/v2/models/t2v/generate"
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(address, body, {"Content-Type": kind}), timeout=HANGS_S)
    assert error.value.code == 400
    assert "0 steps" in error.value.read().decode()


def test_a_cut_prompt_is_told_to_the_client_and_to_no_log(server, capfd):
    events = []
    with server.client("t2v") as client:
        long = "a red panda, very detailed, " * 300
        client.generate(long, negative_prompt="x", on_progress=events.append, **SMALL)
        client.generate("a red panda", negative_prompt=long, on_progress=events.append, **SMALL)
        client.generate("a red panda", negative_prompt="x", on_progress=events.append, **SMALL)
    assert [event["cut"] for event in events if event["phase"] == "start"] == [["prompt"], ["negative_prompt"], []]
    assert "red panda" not in capfd.readouterr().err


def test_administration_is_closed(server):
    with grpc.InferenceServerClient(server.url) as client:
        for call in (client.get_model_repository_index, lambda: client.load_model("t2v"), client.get_trace_settings):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
    for path in ("/v2/repository/index", "/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status"):
        with pytest.raises(urllib.error.HTTPError) as error:
            body = b"{}" if path == "/v2/repository/index" else None
            urllib.request.urlopen(urllib.request.Request(server.http + path, body), timeout=HANGS_S)
        assert error.value.code == 403


def literal(text):
    """A string of HPACK without Huffman's code."""
    return bytes([len(text)]) + text


def grpc_call(server, method, **headers):
    """What the server sends for a call with no message, whatever bytes are in the headers."""
    sent = {":method": "POST", ":scheme": "http", ":path": f"/inference.GRPCInferenceService/{method}",
            ":authority": "x", "te": "trailers", "content-type": "application/grpc", **headers}  # fmt: skip
    block = b"".join(b"\0" + literal(name.encode()) + literal(value.encode()) for name, value in sent.items())
    frames = ((4, 0, 0, b""), (1, 4, 1, block), (0, 1, 1, bytes(5)))  # settings, headers, an empty message
    parts = [struct.pack(">I", len(data))[1:] + struct.pack(">BBI", kind, flags, stream) + data
             for kind, flags, stream, data in frames]  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.options.grpc_port), timeout=HANGS_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(parts))
        connection.settimeout(3)
        received = b""
        with contextlib.suppress(TimeoutError):
            while data := connection.recv(65536):
                received += data
        return received


def test_the_lock_of_the_administration_opens_to_nobody_who_knows_it(server):
    """Its key stands on a command line that everybody can read; no request can carry it."""
    words = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().decode().split("\0")
    (lock,) = (word for word in words if word.startswith("--grpc-restricted-protocol="))
    name, _, value = lock.partition(":")[2].rpartition("=")
    assert b"triton" in grpc_call(server, "ServerMetadata")  # so the call is one
    answer = grpc_call(server, "RepositoryIndex", **{f"triton-grpc-protocol-{name}": value})
    assert b"t2v" not in answer
    with socket.create_connection(("127.0.0.1", server.options.http_port), timeout=HANGS_S) as connection:
        head = "POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close"
        connection.sendall(f"{head}\r\n{name}: {value}\r\n\r\n{{}}".encode())
        assert b"t2v" not in connection.recv(65536)
    assert server.is_ready()
