"""The parts of CuPy and TensorRT that the engine uses, on host memory; every rule of the real ones is asserted."""

import itertools
import json
import weakref
from types import SimpleNamespace

import numpy as np


class Memory:
    """A card's bytes: in use, kept in CuPy's reserve, and the most of both so far."""

    def __init__(self, total_bytes):
        self.total_bytes, self.used, self.reserve, self.peak = total_bytes, 0, 0, 0

    def take(self, owner, size):
        """``size`` bytes until ``owner`` is gone."""
        if self.used + self.reserve + size > self.total_bytes:
            self.reserve = 0
        if self.used + size > self.total_bytes:
            raise OutOfMemoryError
        self.reserve -= min(self.reserve, size)
        self.used += size
        self.peak = max(self.peak, self.used + self.reserve)
        weakref.finalize(owner, self._give, size)
        return owner

    def _give(self, size):
        self.used, self.reserve = self.used - size, self.reserve + size

    def free_reserve(self):
        self.reserve = 0


class Block:
    """What ``cupy.cuda.alloc`` gives."""

    def __init__(self, ptr, size):
        self.ptr, self.mem = ptr, SimpleNamespace(size=size)


class DeviceArray(np.ndarray):
    """An array that numpy code must not mistake for a host array; ``data.ptr`` is its address."""

    memory = None

    def __array_finalize__(self, source):
        self.memory = getattr(source, "memory", None)

    def copy(self):
        return placed(np.array(self), self.memory)

    def get(self, stream=None):
        return np.array(self)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])


def placed(array, memory):
    """``array``, which owns its bytes, as an array of the device."""
    if memory is not None:
        memory.take(array, array.nbytes)
    there = array.view(DeviceArray)
    there.memory = memory
    return there


class OutOfMemoryError(Exception):
    pass


class FakeStream:
    def __init__(self, non_blocking=False):
        self.ptr, self.recording, self.replayed = 7, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        pass

    def begin_capture(self):
        self.recording = []

    def end_capture(self):
        work, self.recording = self.recording, None

        def launch(stream):
            stream.replayed += 1
            for step in work:
                step()

        return SimpleNamespace(launch=launch)


class FakeCupy:
    ndarray = DeviceArray

    def __init__(self, capability="89", memory_bytes=10_000, memory=None):
        self.memory_bytes, self.arenas, self.memory = memory_bytes, [], memory
        addresses = itertools.count(256, 256)

        def alloc(size):
            if memory is None and size > memory_bytes:
                raise OutOfMemoryError
            block = Block(next(addresses), size)
            if memory is not None:
                memory.take(block, size)
            self.arenas.append(size)
            return block

        def information():
            return (2**30, 24 * 2**30) if memory is None else (memory.total_bytes - memory.used, memory.total_bytes)

        self.cuda = SimpleNamespace(
            Stream=FakeStream,
            alloc=alloc,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=SimpleNamespace(memGetInfo=information, CUDARuntimeError=OSError),
            Device=lambda: SimpleNamespace(compute_capability=capability),
        )

    def asarray(self, array):
        return array if isinstance(array, DeviceArray) else placed(np.array(array), self.memory)

    def ascontiguousarray(self, array):
        if array.flags.c_contiguous:
            return array
        return placed(np.array(array, order="C"), self.memory)

    def empty(self, shape, dtype):
        return placed(np.zeros(shape, dtype), self.memory)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: self.memory and self.memory.free_reserve())


class FakeContext:
    """Computes ``outputs[i] = compute[i](inputs)`` on the arrays at the bound addresses."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.scratch, self.profiles = engine, {}, {}, None, []

    def set_optimization_profile_async(self, index, stream):
        self.profiles.append(index)
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        assert address % 4 == 0
        self.addresses[name] = address

    def update_device_memory_size_for_shapes(self):
        assert self.shapes
        return self.engine.scratch_bytes

    def set_device_memory(self, address, size):
        self.scratch = (address, size)

    def execute_async_v3(self, stream):
        assert self.scratch[1] == self.engine.scratch_bytes
        addresses = dict(self.addresses)
        work = lambda: self.engine.compute(addresses, self.shapes)  # noqa: E731
        if self.engine.device.stream.recording is not None:
            self.engine.device.stream.recording.append(work)
        else:
            work()
        return True


class FakeTensorRT:
    """The module; every plan deserialises to ``engine``."""

    __version__ = "11.4.0"

    def __init__(self, engine):
        self.Logger = lambda severity: SimpleNamespace(severity=severity)
        self.Logger.WARNING = 2
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan[:] else None)
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")


class FakeEngine:
    def __init__(self, compute, scratch_bytes=1000):
        self.compute, self.scratch_bytes, self.device, self.contexts = compute, scratch_bytes, None, []

    def create_execution_context(self, strategy):
        assert strategy == "user"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class PaperEngine:
    """An engine that takes ``weights_bytes`` and ``scratch_bytes`` of a card and computes zeros."""

    def __init__(self, name, scratch_bytes):
        self.name, self.scratch_bytes, self.device = name, scratch_bytes, SimpleNamespace(stream=FakeStream())

    def create_execution_context(self, strategy):
        assert strategy == "user"
        return FakeContext(self)

    def compute(self, addresses, shapes):
        """The outputs are zero from the start."""


def paper_tensorrt(memory):
    """The module, for plans that are JSON of ``name``, ``weights`` and ``scratch``."""
    trt = FakeTensorRT(None)

    def deserialised(plan):
        told = json.loads(bytes(plan[:]))
        try:
            return memory.take(PaperEngine(told["name"], told["scratch"]), told["weights"])
        except OutOfMemoryError:
            return None

    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialised)
    return trt


def at(address, shape, dtype=np.float32):
    """The array at ``address``."""
    import ctypes

    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
