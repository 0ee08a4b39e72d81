"""Stages on a GPU of paper: its plans are ONNX graphs that ONNX Runtime runs at the bound addresses."""

import ctypes
import weakref
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from runtime.backend import tensorrt_backend
from runtime.block_backend import BlockOptions
from runtime.blocks_tensorrt import GpuStages
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.engine_tensorrt import Device
from tests.export.graphs.test_dit import relative_l2
from tests.runtime.fake_gpu import FakeCupy, FakeEngine, FakeStream, FakeTensorRT, OutOfMemoryError, at
from tests.runtime.test_block_transformer import given_to
from wan22.bundle import open_bundle
from wan22.errors import UserError


class Allocation:
    def __init__(self, size):
        self.size = size


class Pointer:
    """Device memory with real bytes, which are spoilt when the last pointer to them is gone."""

    def __init__(self, gpu, mem, ptr):
        self._gpu, self.mem, self.ptr = gpu, mem, ptr

    @classmethod
    def new(cls, size, gpu):
        memory = np.zeros(size + 256, np.uint8)
        mem = Allocation(size)
        weakref.finalize(mem, memory.fill, 0xFF)
        return cls(gpu, mem, memory.ctypes.data + -memory.ctypes.data % 256)

    def __add__(self, offset):
        return Pointer(self._gpu, self.mem, self.ptr + offset)

    def copy_from_host_async(self, source, size, stream):
        assert stream in self._gpu.streams
        self._gpu.copied.append(size)
        ctypes.memmove(self.ptr, source.value, size)


class Stream(FakeStream):
    def __init__(self, non_blocking=False):
        assert non_blocking
        super().__init__(non_blocking)
        self.waited = []

    def wait_event(self, event):
        assert event.recorded_on is not None
        assert event.recorded_on is not self, "a stream keeps its own order"
        self.waited.append(event)


class Event:
    done = True

    def __init__(self):
        self.recorded_on = None

    def record(self, stream):
        self.recorded_on = stream

    def synchronize(self):
        assert self.recorded_on is not None


class Pinned(bytearray):
    @property
    def ptr(self):
        return np.frombuffer(self, np.uint8).ctypes.data


class StreamingCupy(FakeCupy):
    """With pinned memory of ``pinned_bytes``, device memory of real bytes, streams and events."""

    def __init__(self, pinned_bytes):
        super().__init__(memory_bytes=2**40)
        self.copied, self.streams, self.left = [], [], pinned_bytes
        self.cuda.alloc = lambda size: Pointer.new(size, self)
        self.cuda.Event, self.cuda.Stream = Event, self.stream
        self.cuda.get_elapsed_time = self.elapsed_ms
        self.cuda.PinnedMemory, self.cuda.PinnedMemoryPointer = self.pin, lambda memory, offset: memory

    def stream(self, non_blocking=False):
        self.streams.append(Stream(non_blocking))
        return self.streams[-1]

    def elapsed_ms(self, begin, end):
        """2 ms for a copy, and 1 ms for a wait on the stream of computations."""
        assert begin.recorded_on is end.recorded_on
        return 1.0 if begin.recorded_on is self.streams[0] else 2.0

    def pin(self, size):
        if size > self.left:
            raise self.cuda.runtime.CUDARuntimeError("memory")
        self.left -= size
        return Pinned(size)


def runs_onnx(plan):
    """The engine of a stage whose plan is an ONNX graph."""
    session = ort.InferenceSession(bytes(plan[:]), providers=["CPUExecutionProvider"])
    fixed = {x.name: tuple(x.shape) for x in session.get_inputs() if all(isinstance(d, int) for d in x.shape)}

    def compute(addresses, shapes):
        assert {x.name for x in (*session.get_inputs(), *session.get_outputs())} <= addresses.keys()
        feeds = {x.name: at(addresses[x.name], shapes.get(x.name, fixed.get(x.name))) for x in session.get_inputs()}
        for output, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            assert not any(np.shares_memory(at(addresses[output.name], value.shape), x) for x in feeds.values())
            at(addresses[output.name], value.shape)[...] = value

    engine = FakeEngine(compute)
    engine.name, engine.device = "", SimpleNamespace(stream=FakeStream())
    return engine


@pytest.fixture
def gpu():
    """``gpu(folder, weights_in, pinned_bytes)`` → CuPy, the bundle and its backend."""
    with ExitStack() as stack:

        def make(folder, weights_in="auto", vram=None, pinned_bytes=2**30):
            cupy, trt = StreamingCupy(pinned_bytes), FakeTensorRT(None)
            trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=runs_onnx)
            bundle = open_bundle(folder, "engines")
            device = stack.enter_context(Device(trt, cupy))
            return cupy, bundle, tensorrt_backend(bundle, device, BlockOptions(weights_in, vram))

        yield make


@pytest.mark.parametrize("weights_in", ["vram", "host", "disk"])
@pytest.mark.parametrize("name", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_it_computes_what_the_whole_engine_computes(flow_of, blocks_of, gpu, name, weights_in):
    whole, given = open_bundle(flow_of(name).engines, "engines"), given_to(name)
    _, bundle, backend = gpu(blocks_of(name), weights_in)
    for expert in bundle.manifest.spec.experts:
        with (
            OnnxRuntimeEngine(whole.folder, whole.component(expert)) as one,
            backend.new_engine(bundle.component(expert)) as other,
        ):
            expected = one(**given)
            for _ in range(3):
                assert relative_l2(other(**given), expected) <= 1.5e-6
            streamed, layers = backend.blocks.streamed, bundle.manifest.spec.dit.layers
            assert streamed.seconds_copied >= 0.002 * streamed.blocks  # and the reads from disk
            assert streamed.seconds_waited == pytest.approx(0.001 * 3 * layers * (1 + (expert == "low_noise")))


@pytest.mark.parametrize("weights_in", ["vram", "disk"])
def test_the_layers_of_a_text_encoder_go_the_same_way(flow_of, blocks_of, gpu, weights_in):
    name, ids = "ti2v-5b-tiny", np.random.default_rng(0).integers(0, 1000, (1, 30))
    whole = open_bundle(flow_of(name).engines, "engines")
    _, bundle, backend = gpu(blocks_of(name), weights_in)
    with (
        OnnxRuntimeEngine(whole.folder, whole.component("text_encoder")) as one,
        backend.new_engine(bundle.component("text_encoder")) as other,
    ):
        for _ in range(2):
            assert relative_l2(other(input_ids=ids), one(input_ids=ids)) <= 1.5e-6


def test_a_system_that_cannot_pin_a_file_reads_blocks_from_disk(blocks_of, gpu, caplog):
    _, bundle, backend = gpu(blocks_of("ti2v-5b-tiny"), "host", pinned_bytes=6 * 2**20)
    with backend.new_engine(bundle.component("dit")) as engine:
        engine(**given_to("ti2v-5b-tiny"))
    assert "cannot pin" in caplog.text
    size = bundle.component("dit").weights[1].size_bytes
    assert f"ulimit -l {-(-size // 1024)} would allow it" in caplog.text


def test_a_system_that_cannot_pin_anything_is_refused(blocks_of, gpu):
    _, bundle, backend = gpu(blocks_of("ti2v-5b-tiny"), "disk", pinned_bytes=0)
    with (
        pytest.raises(UserError, match=r"cannot pin 2 buffers .* ulimit -l [0-9]+ or more"),
        backend.new_engine(bundle.component("dit")),
    ):
        pass


@pytest.mark.parametrize("weights_in", ["host", "disk"])
def test_ctrl_c_inside_a_forward_leaves_engines_that_go_on(blocks_of, gpu, weights_in, monkeypatch):
    _, bundle, backend = gpu(blocks_of("ti2v-5b-tiny"), weights_in)
    given, ran, run = given_to("ti2v-5b-tiny"), [], GpuStages.run

    def interrupted(self, name, *rest):
        ran.append(name)
        if ran == ["patches", "qkv", "attend", "rest", "qkv", "attend"]:
            raise KeyboardInterrupt
        run(self, name, *rest)

    with backend.new_engine(bundle.component("dit")) as engine:
        expected = engine(**given)
        monkeypatch.setattr(GpuStages, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine(**given)
        assert np.array_equal(engine(**given), expected)


def test_no_room_on_the_card_is_one_line(blocks_of, gpu):
    cupy, bundle, backend = gpu(blocks_of("ti2v-5b-tiny"))

    def full(size):
        raise OutOfMemoryError

    with backend.new_engine(bundle.component("dit")) as engine:
        cupy.cuda.alloc = full
        with pytest.raises(UserError, match="no room for"):
            engine(**given_to("ti2v-5b-tiny"))
