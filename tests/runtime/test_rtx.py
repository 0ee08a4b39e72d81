"""TensorRT-RTX's kernels are kept between processes, whole or not at all; an engine that does not run says why."""

from types import SimpleNamespace

import pytest

import runtime.rtx
from runtime.engine_tensorrt import Device
from runtime.rtx import KernelCache, check_valid, configure
from tests.runtime.fake_gpu import FakeCupy, FakeEngine, FakeTensorRT
from tests.runtime.test_engine_tensorrt import component, doubled, row
from wan22.errors import UserError

trt = pytest.importorskip("tensorrt_rtx", reason="the API of TensorRT-RTX")


class FakeCache:
    """A cache that fits blobs of this machine, which begin with ``ours``."""

    def __init__(self):
        self.content, self.refused = b"ours", 0

    def deserialize(self, blob):
        if not blob.startswith(b"ours"):
            self.refused += 1
            return False
        self.content = blob
        return True

    def serialize(self):
        return self.content


class FakeConfig:
    def __init__(self):
        self.cache, self.made = None, FakeCache()

    def create_runtime_cache(self):
        return self.made

    def set_runtime_cache(self, cache):
        self.cache = cache


def gpu(card=b"NVIDIA GeForce RTX 4090", driver=13010):
    calls = SimpleNamespace(
        getDeviceProperties=lambda _: {"name": card}, getDevice=lambda: 0, driverGetVersion=lambda: driver
    )
    return SimpleNamespace(cupy=SimpleNamespace(cuda=SimpleNamespace(runtime=calls)), trt=trt)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """``kept(gpu)`` → the cache of an engine of the bundle ``tmp_path/engines``."""
    monkeypatch.setattr(runtime.rtx, "CACHES", tmp_path / "home")
    (tmp_path / "engines").mkdir(exist_ok=True)
    return lambda machine=None: KernelCache(machine or gpu(), tmp_path / "engines", component())


def test_kernels_come_back_in_the_next_process(kept, tmp_path):
    first, second = FakeConfig(), FakeConfig()
    one = kept()
    one.attach(first)
    assert first.cache is first.made
    first.made.content = b"ours and compiled"
    one.save()
    kept().attach(second)
    assert second.made.content == b"ours and compiled"
    assert [path.parts[-3] for path in one.files] == ["engines.kernels", "home"]
    assert not list((tmp_path / "engines").iterdir())


def test_another_driver_or_gpu_has_another_file(kept):
    names = {kept(machine).files[0].parent.name for machine in (gpu(), gpu(driver=13020), gpu(b"NVIDIA L40S"))}
    assert len(names) == 3
    assert any(trt.__version__ in name for name in names)


@pytest.mark.parametrize("content", [b"", b"of another machine"])
def test_a_file_that_does_not_fit_is_replaced(kept, content):
    one, config = kept(), FakeConfig()
    one.files[0].parent.mkdir(parents=True)
    one.files[0].write_bytes(content)
    one.attach(config)
    one.save()
    assert one.files[0].read_bytes() == b"ours"


def test_nothing_new_is_not_written_again(kept):
    one, config = kept(), FakeConfig()
    one.attach(config)
    one.save()
    before = one.files[0].stat().st_mtime_ns
    again = kept()
    again.attach(FakeConfig())
    again.save()
    assert one.files[0].stat().st_mtime_ns == before


def test_a_bundle_in_a_place_that_cannot_be_written_uses_the_users_folder(kept, tmp_path):
    (tmp_path / "engines.kernels").write_text("a file, in which no folder can be made")
    one, config = kept(), FakeConfig()
    one.attach(config)
    one.save()
    assert not one.files[0].exists()
    assert one.files[1].read_bytes() == b"ours"
    again = FakeConfig()
    again.made.content = b""
    kept().attach(again)
    assert again.made.content == b"ours"


def test_nowhere_to_write_costs_only_the_kernels(kept, tmp_path):
    for name in ("engines.kernels", "home"):
        (tmp_path / name).write_text("a file")
    one = kept()
    one.attach(FakeConfig())
    one.save()


# -- validity


def told(validity, *reasons):
    bits = sum(int(reason) for reason in reasons)
    return SimpleNamespace(get_engine_validity=lambda _: (validity, bits))


def test_an_engine_that_does_not_run_says_why():
    kinds, validity = trt.EngineInvalidityDiagnostics, trt.EngineValidity
    runtime_ = told(validity.INVALID, kinds.OLD_CUDA_DRIVER, kinds.UNSUPPORTED_CC)
    with pytest.raises(UserError, match=r"dit.plan does not run here: unsupported cc, old cuda driver"):
        check_valid(trt, runtime_, b"", "dit.plan")
    for fine in (validity.VALID, validity.SUBOPTIMAL):
        check_valid(trt, told(fine), b"", "dit.plan")
    check_valid(trt, SimpleNamespace(), b"", "dit.plan")  # TensorRT


def test_the_real_module_refuses_a_damaged_engine():
    real = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    with pytest.raises(UserError, match="does not run here: malformed engine"):
        check_valid(trt, real, b"no engine at all" * 100, "dit.plan")


def test_a_device_asks_before_it_loads(tmp_path):
    (tmp_path / "dit.plan").write_bytes(b"plan")
    module = FakeTensorRT(FakeEngine(doubled))
    module.EngineValidity, module.EngineInvalidityDiagnostics = trt.EngineValidity, trt.EngineInvalidityDiagnostics
    device = Device(module, FakeCupy())
    device.runtime = told(trt.EngineValidity.INVALID, trt.EngineInvalidityDiagnostics.VERSION_MISMATCH)
    with pytest.raises(UserError, match="version mismatch"), device.engine(tmp_path, component(), ()) as engine:
        engine(x=row(1))


# -- the real API


def test_kernels_are_specialised_before_a_call_and_fixed_shapes_are_replayed():
    dynamic, fixed = SimpleNamespace(cuda_graph_strategy=None), SimpleNamespace(cuda_graph_strategy=None)
    configure(trt, dynamic, fixed=False)
    configure(trt, fixed, fixed=True)
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert dynamic.dynamic_shapes_kernel_specialization_strategy == eager
    assert dynamic.cuda_graph_strategy is None
    assert fixed.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
