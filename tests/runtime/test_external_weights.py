"""Weights as inputs of an engine: bound by address, one engine for two experts, pinned copies in host memory."""

import ctypes
import json
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.engine_tensorrt import Device
from runtime.weight_sets import WeightSets
from tests.runtime.fake_gpu import FakeCupy, FakeEngine, FakeTensorRT, OutOfMemoryError, at
from wan22.bundle import Bundle, Component, File, Tensor
from wan22.errors import UserError
from wan22.specs import Precision

X, Y = Tensor("x", "float32", (1, 4)), Tensor("y", "float32", (1, 4))
OFFSET = 256


class Memory:
    """Device memory in host memory."""

    def __init__(self, size):
        self.buffer = np.zeros(size, np.uint8)
        self.ptr, self.mem = self.buffer.ctypes.data, SimpleNamespace(size=size)

    def __add__(self, offset):
        moved = Memory(0)
        moved.buffer, moved.ptr = self.buffer[offset:], self.ptr + offset
        return moved

    def copy_from_host(self, pointer, size):
        assert size <= len(self.buffer)
        ctypes.memmove(self.ptr, pointer.value, size)

    def copy_from_host_async(self, pointer, size, stream):
        self.copy_from_host(pointer, size)


class Cupy(FakeCupy):
    def __init__(self, device_bytes=10_000, pinned_bytes=10_000):
        super().__init__(memory_bytes=device_bytes)
        self.pinned = []

        def alloc(size):
            if size > device_bytes:
                raise OutOfMemoryError
            return Memory(size)

        def pin(size):
            if size > pinned_bytes:
                raise OSError
            self.pinned.append(size)
            return bytearray(size)

        def pointer(memory, offset):
            return np.frombuffer(memory, np.uint8).view(Pinned)

        self.cuda.alloc, self.cuda.PinnedMemory, self.cuda.PinnedMemoryPointer = alloc, pin, pointer


class Pinned(np.ndarray):
    @property
    def ptr(self):
        return self.ctypes.data


def scaled(addresses, shapes):
    at(addresses["y"], (1, 4))[...] = at(addresses["x"], (1, 4)) * at(addresses["w"], (1,))


@pytest.fixture
def experts(tmp_path):
    """``experts(cupy)`` → a device and both experts of one plan: the first multiplies by 2, the second by 3."""

    def make(cupy):
        (tmp_path / "experts.plan").write_bytes(b"plan")
        places = [{"name": "unused", "offset": 0, "size_bytes": 4}, {"name": "w", "offset": OFFSET, "size_bytes": 4}]
        (tmp_path / "experts.layout.json").write_text(json.dumps(places))
        engine = FakeEngine(scaled)
        engine.device = device = Device(FakeTensorRT(engine), cupy)
        opened = []
        for name, factor in (("high_noise", 2), ("low_noise", 3)):
            content = np.zeros(2 * OFFSET, np.uint8)
            content[OFFSET : OFFSET + 4] = np.array([factor], np.float32).view(np.uint8)
            content.tofile(tmp_path / f"{name}.weights")
            weights = (File("experts.layout.json", "", 1), File(f"{name}.weights", "", 2 * OFFSET))
            component = Component(name, File("experts.plan", "", 4), weights, (X,), (Y,), Precision.FP8)
            opened.append(device.engine(tmp_path, component, ()))
        return device, engine, opened

    return make


def call(engine):
    return engine(x=np.ones((1, 4), np.float32)).tolist()[0][0]


def test_each_expert_computes_with_its_own_weights_on_one_engine(experts):
    device, engine, (high, low) = experts(Cupy())
    loaded = []
    device.runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: loaded.append(plan) or engine)
    with high, low:
        assert (call(high), call(low), call(high)) == (2, 3, 2)
    assert len(loaded) == 1


def test_an_expert_that_comes_back_is_copied_from_pinned_memory_not_read_again(experts, tmp_path):
    cupy = Cupy()
    _, _, (high, low) = experts(cupy)
    for expert, factor in ((high, 2), (low, 3), (high, 2)):
        with expert:
            assert call(expert) == factor
    assert cupy.pinned == [2 * OFFSET, 2 * OFFSET]


def test_without_room_to_pin_weights_come_from_the_file(experts):
    _, _, (high, _) = experts(Cupy(pinned_bytes=0))
    with high:
        assert call(high) == 2


def test_weights_that_do_not_fit_the_gpu_are_told(experts):
    _, _, (high, _) = experts(Cupy(device_bytes=100))
    with pytest.raises(UserError, match=r"no room for high_noise\.weights"), high:
        pass


def test_a_weight_set_binds_its_weights_to_the_plan_that_is_loaded(experts, tmp_path):
    """By turns, from files elsewhere; each file is pinned once."""
    cupy = Cupy()
    device, engine, opened = experts(cupy)
    loaded = []
    device.runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: loaded.append(plan) or engine)
    own = [expert._component for expert in opened]
    (tmp_path / "ink").mkdir()
    for name in ("experts.plan", "experts.layout.json", "high_noise.weights", "low_noise.weights"):
        (tmp_path / "ink" / name).write_bytes((tmp_path / name).read_bytes())
    content = np.fromfile(tmp_path / "high_noise.weights", np.uint8)
    content[OFFSET : OFFSET + 4] = np.array([7], np.float32).view(np.uint8)
    content.tofile(tmp_path / "ink" / "high_noise.weights")
    build = SimpleNamespace(backend="tensorrt")
    spec = SimpleNamespace(experts=("high_noise", "low_noise"))
    manifest = SimpleNamespace(spec=spec, build=build, components=tuple(own))
    sets = WeightSets(Bundle(tmp_path, manifest), {"ink": Bundle(tmp_path / "ink", manifest)})
    found = []
    for lora in (None, "ink", "ink", None, "ink"):
        sets.choose(lora)
        for name in spec.experts:
            with device.engine(tmp_path, sets.component(name), ()) as expert:
                found.append(call(expert))
    assert found == [2, 3, 7, 3, 7, 3, 2, 3, 7, 3]
    assert len(loaded) == 1
    assert cupy.pinned == [2 * OFFSET] * 4
