"""What strangers send: each of it is refused with a reason, and the server goes on serving."""

import io
import queue
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from tests.triton_repo.serving import SMALL, serving

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
        result, error = answers.get(timeout=30)
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
    ("t2v", {}, "expected"),
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
    ("t2v", {**PROMPT, "progress_every": int32(0)}, "progress_every 0"),
    ("t2v", {**PROMPT, "seed": ("INT64", [-1])}, "seed -1"),
    ("t2v", {**PROMPT, "deadline_unix_ms": ("INT64", [1])}, "a deadline that has passed"),
    # types and shapes, which Triton itself refuses
    ("t2v", {**PROMPT, "steps": fp32(4)}, "data-type"),
    ("t2v", {**PROMPT, "steps": ("INT32", [4, 5])}, "shape"),
    ("t2v", {**PROMPT, "engines": text(b"/etc")}, "unexpected inference input 'engines'"),
    # images
    ("t2v", {**PROMPT, "image": image(png(64, 64))}, "an image for t2v-a14b-tiny"),
    ("i2v", PROMPT, "no image for i2v-a14b-tiny"),
    ("i2v", {**PROMPT, "image": image(b"")}, "no image"),
    ("i2v", {**PROMPT, "image": image(b"/etc/passwd")}, "no image"),
    ("i2v", {**PROMPT, "image": image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, "no image"),
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


def test_administration_is_closed(server):
    with grpc.InferenceServerClient(server.url) as client:
        for call in (client.get_model_repository_index, lambda: client.load_model("t2v"), client.get_trace_settings):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
