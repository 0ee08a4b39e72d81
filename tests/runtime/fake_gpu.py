"""The parts of CuPy and TensorRT that the engine uses, on host memory; every rule of the real ones is asserted."""

import itertools
from types import SimpleNamespace

import numpy as np


class DeviceArray(np.ndarray):
    """An array that numpy code must not mistake for a host array; ``data.ptr`` is its address."""

    def get(self, stream=None):
        return np.array(self)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])


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

    def __init__(self, capability="89", memory_bytes=10_000):
        self.memory_bytes, self.arenas = memory_bytes, []
        addresses = itertools.count(256, 256)

        def alloc(size):
            if size > memory_bytes:
                raise OutOfMemoryError
            self.arenas.append(size)
            return SimpleNamespace(ptr=next(addresses), mem=SimpleNamespace(size=size))

        self.cuda = SimpleNamespace(
            Stream=FakeStream,
            alloc=alloc,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=SimpleNamespace(memGetInfo=lambda: (2**30, 24 * 2**30), CUDARuntimeError=OSError),
            Device=lambda: SimpleNamespace(compute_capability=capability),
        )

    def asarray(self, array):
        return array if isinstance(array, DeviceArray) else np.array(array).view(DeviceArray)

    def ascontiguousarray(self, array):
        return np.ascontiguousarray(array).view(DeviceArray)

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype).view(DeviceArray)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)


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


def at(address, shape, dtype=np.float32):
    """The array at ``address``."""
    import ctypes

    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
