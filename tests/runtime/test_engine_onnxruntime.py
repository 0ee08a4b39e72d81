"""ONNX Runtime runs on what is there, CUDA before CPU."""

import subprocess
import sys
import tracemalloc
from contextlib import ExitStack

import numpy as np
import onnxruntime
import pytest

from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.vae import decode
from wan22.bundle import open_bundle


@pytest.mark.parametrize(
    "there", [["CPUExecutionProvider"], ["AzureExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]]
)
def test_cuda_is_used_where_onnxruntime_has_it(monkeypatch, tiny_engines, there):
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: asked.append(providers))
    component = open_bundle(tiny_engines, "engines").component("text_encoder")
    with OnnxRuntimeEngine(tiny_engines, component):
        pass
    assert asked == [[p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in there]]


def test_a_left_engine_holds_no_session(tiny_engines):
    component = open_bundle(tiny_engines, "engines").component("text_encoder")
    engine = OnnxRuntimeEngine(tiny_engines, component)
    with engine:
        assert engine._session is not None
    assert engine._session is None


ARENA_OF_THEIR_OWN = """
import sys
from pathlib import Path
import numpy as np, onnxruntime
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from wan22.bundle import open_bundle

kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
onnxruntime.create_and_register_allocator(memory, None)
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.use_env_allocators", "1")
component, ids = open_bundle(Path(sys.argv[1]), "engines").component("text_encoder"), np.array([[5, 6]], np.int64)
theirs = onnxruntime.InferenceSession(Path(sys.argv[1]) / component.graph.path, options)
(before,) = theirs.run(None, {"input_ids": ids})
with OnnxRuntimeEngine(Path(sys.argv[1]), component) as engine:
    ours = engine(input_ids=ids)
    (after,) = theirs.run(None, {"input_ids": ids})
assert np.array_equal(before, ours) and np.array_equal(before, after)
"""


def test_a_process_may_have_an_arena_of_its_own(tiny_engines):
    subprocess.run([sys.executable, "-c", ARENA_OF_THEIR_OWN, str(tiny_engines)], check=True)


def test_results_are_the_callers_own_and_inputs_may_be_views(tiny_engines):
    component = open_bundle(tiny_engines, "engines").component("text_encoder")
    ids = np.array([[5, 6], [7, 8]], np.int64)
    with OnnxRuntimeEngine(tiny_engines, component) as engine:
        first = engine(input_ids=ids[:1])
        kept = first.copy()
        column = engine(input_ids=ids.T[:1])
        again = engine(input_ids=np.array([[5, 7]], np.int64))
    assert np.array_equal(first, kept)
    assert np.array_equal(column, again)
    assert not np.array_equal(first, again)


@pytest.fixture
def decoder(tiny_engines):
    """The engines of the first chunk and of later ones."""
    bundle = open_bundle(tiny_engines, "engines")
    with ExitStack() as stack:
        yield [
            stack.enter_context(OnnxRuntimeEngine(tiny_engines, bundle.component(f"vae_decoder_{part}")))
            for part in ("first", "next")
        ]


def latents(frames, side=4):
    return np.random.default_rng(0).standard_normal((1, 16, frames, side, side), dtype=np.float32)


def state(first):
    _, *caches = first(latents=latents(1))
    return {f"cache_{index:02d}": array for index, array in enumerate(caches)}


def test_new_state_lies_where_the_old_one_was(decoder):
    first, later = decoder
    caches = state(first)
    _, *following = later(latents=latents(1), **caches)
    assert all(new is old for new, old in zip(following, caches.values(), strict=True))


def test_state_in_memory_of_others_stays_as_it_is_and_the_results_are_the_same(decoder):
    first, later = decoder
    caches = state(first)
    borrowed = {name: array.copy()[:] for name, array in caches.items()}  # views, which own nothing
    before = {name: array.copy() for name, array in borrowed.items()}
    frames, *following = later(latents=latents(1), **borrowed)
    assert all(np.array_equal(borrowed[name], before[name]) for name in borrowed)
    again, *in_place = later(latents=latents(1), **caches)
    assert np.array_equal(again, frames)
    assert all(np.array_equal(a, b) for a, b in zip(following, in_place, strict=True))


def test_a_decode_holds_one_set_of_caches(decoder):
    set_bytes = sum(array.nbytes for array in decoder[0](latents=latents(1, side=16))[1:])
    tracemalloc.start()
    try:
        for _ in decode(*decoder, latents(3, side=16)):
            pass
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert set_bytes < peak_bytes < 1.5 * set_bytes


SHORT_OF_MEMORY = """
import re, resource, sys
from pathlib import Path
import numpy as np
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from wan22.bundle import open_bundle
from wan22.errors import UserError
folder, spare = Path(sys.argv[1]), int(sys.argv[2])
component = open_bundle(folder, "engines").component("vae_decoder_first")
with OnnxRuntimeEngine(folder, component) as engine:
    engine(latents=np.zeros((1, 16, 1, 4, 4), np.float32))
    size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, size + spare))
    try:
        engine(latents=np.zeros((1, 16, 1, 256, 256), np.float32))
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("spare_bytes", [2**26, 5 * 2**29], ids=["for the outputs", "inside ONNX Runtime"])
def test_too_little_memory_is_told_in_one_line(tiny_engines, spare_bytes):
    words = [sys.executable, "-c", SHORT_OF_MEMORY, str(tiny_engines), str(spare_bytes)]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert told.startswith("out of memory in vae_decoder_first: ")
    assert "| use --residency one-component, a smaller --size or fewer --frames" in told
