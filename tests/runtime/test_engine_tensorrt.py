"""The TensorRT engine: what it checks, binds, keeps and gives back, on a GPU of paper; and that the API is there."""

import ast
import inspect
from dataclasses import replace

import numpy as np
import pytest

from runtime import engine_tensorrt, rtx
from runtime.engine_tensorrt import Device, TensorRTEngine
from tests.runtime.fake_gpu import DeviceArray, FakeCupy, FakeEngine, FakeTensorRT, Memory, at
from wan22.bundle import Build, Manifest, Source
from wan22.component import Component, File, Tensor
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan22.stamp import Stamp

X, Y = Tensor("x", "float32", (1, "frames")), Tensor("y", "float32", (1, "frames"))
CACHE, NEXT = (Tensor(name, "float32", (1, "2*frames")) for name in ("cache_00", "next_cache_00"))
FIXED, RANGE, LONG = {"frames": (5, 5, 5)}, {"frames": (1, 5, 9)}, {"frames": (10, 20, 20)}
BUILD = Build("rtx4090", "tensorrt-rtx", "1.7.1", "8.9", (FIXED,), {}, 1.0)


def component(inputs=(X,), outputs=(Y,)):
    return Component("dit", File("dit.plan", "", 4), (), inputs, outputs, Precision.BF16)


def doubled(addresses, shapes):
    at(addresses["y"], shapes["x"])[...] = 2 * at(addresses["x"], shapes["x"])


@pytest.fixture
def opened(tmp_path):
    """``opened(engine, profiles, ...)`` → a Device and the TensorRTEngine on it, on paper."""

    def make(engine, profiles=(RANGE,), what=None, cupy=None, plan=b"plan"):
        (tmp_path / "dit.plan").write_bytes(plan)
        device = Device(FakeTensorRT(engine), cupy or FakeCupy())
        engine.device = device
        return device, device.engine(tmp_path, what or component(), profiles)

    return make


def row(*values):
    return np.array([values], np.float32)


def test_a_call_computes_and_comes_back_as_numpy(opened):
    _, engine = opened(FakeEngine(doubled))
    with engine:
        y = engine(x=row(1, 2, 3))
    assert type(y) is np.ndarray
    assert y.tolist() == [[2, 4, 6]]


def test_an_input_on_the_device_keeps_the_result_there(opened):
    device, engine = opened(FakeEngine(doubled))
    with engine:
        y = engine(x=device.cupy.asarray(row(1, 2, 3)))
    assert isinstance(y, DeviceArray)


def test_an_input_with_gaps_is_made_contiguous(opened):
    _, engine = opened(FakeEngine(doubled))
    with engine:
        assert engine(x=np.arange(10, dtype=np.float32)[None, ::2]).tolist() == [[0, 4, 8, 12, 16]]


def test_state_stays_on_the_device_and_is_taken_from_there(opened):
    def step(addresses, shapes):
        cache = at(addresses["cache_00"], shapes["cache_00"])
        at(addresses["y"], shapes["x"])[...] = at(addresses["x"], shapes["x"]) + cache[:, : shapes["x"][1]]
        at(addresses["next_cache_00"], shapes["cache_00"])[...] = cache + 1

    _, engine = opened(FakeEngine(step), what=component((X, CACHE), (Y, NEXT)))
    with engine:
        y, cache = engine(x=row(1, 2), cache_00=np.zeros((1, 4), np.float32))
        assert isinstance(cache, DeviceArray)
        again, _ = engine(x=row(1, 2), cache_00=cache)
    assert (type(again), y.tolist(), again.tolist()) == (np.ndarray, [[1, 2]], [[2, 3]])


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"x": row(*range(12))}, UserError, r"frames 12 \(in latents\)"),
        ({"x": row(1).astype(np.float64)}, ValueError, "float64, expected float32"),
        ({"z": row(1)}, ValueError, r"takes \['x'\], not \['z'\]"),
    ],
)
def test_a_wrong_call_is_refused_before_the_device_is_touched(opened, inputs, error, message):
    paper = FakeEngine(doubled)
    _, engine = opened(paper)
    with engine, pytest.raises(error, match=message):
        engine(**inputs)
    assert not paper.contexts[0].addresses


def test_the_profile_that_fits_is_switched_to_and_only_then(opened):
    paper = FakeEngine(doubled)
    _, engine = opened(paper, profiles=(RANGE, LONG))
    with engine:
        for count in (3, 9, 12, 15, 4):
            engine(x=np.zeros((1, count), np.float32))
    assert paper.contexts[0].profiles == [1, 0]


def test_engines_share_one_arena_as_large_as_the_largest_needs(opened, tmp_path):
    small, large = FakeEngine(doubled, 1000), FakeEngine(doubled, 5000)
    device, first = opened(small)
    large.device = device
    with first:
        first(x=row(1))
        device.runtime.deserialize_cuda_engine = lambda _: large
        with TensorRTEngine(device, tmp_path, component(), (RANGE,)) as second:
            second(x=row(1))
            first(x=row(2))
            second(x=row(3))
    assert device.cupy.arenas == [1000, 5000]


def test_too_little_memory_says_how_much_there_is(opened):
    _, engine = opened(FakeEngine(doubled, 20_000))
    with engine, pytest.raises(UserError, match=r"no room for 19.5 KiB of scratch .*1.0 GiB free of 24.0 GiB"):
        engine(x=row(1))


def test_too_little_memory_for_the_arrays_of_a_call_is_told(opened):
    cupy = FakeCupy(memory=Memory(40))  # the input fits, the output does not
    _, engine = opened(FakeEngine(doubled), cupy=cupy)
    with engine, pytest.raises(UserError, match=r"no room for inputs and outputs of dit.*--residency one-component"):
        engine(x=row(1, 2, 3, 4, 5, 6))


def test_a_plan_that_does_not_open_is_reported(opened):
    _, engine = opened(FakeEngine(doubled))
    engine._device.runtime.deserialize_cuda_engine = lambda _: None
    with pytest.raises(UserError, match=r"no room for dit.plan .* or it is damaged"), engine:
        pass


def test_fixed_shapes_are_recorded_on_the_second_call_and_replayed_after(opened):
    device, engine = opened(FakeEngine(doubled), profiles=(FIXED,))
    with engine:
        results = [engine(x=row(*(range(n, n + 5)))).tolist() for n in range(4)]
    assert results == [[[2 * k for k in range(n, n + 5)]] for n in range(4)]
    assert device.stream.replayed == 3


def test_a_replayed_call_leaves_earlier_results_and_inputs_alone(opened):
    device, engine = opened(FakeEngine(doubled), profiles=(FIXED,))
    given = device.cupy.asarray(row(1, 1, 1, 1, 1))
    with engine:
        first = engine(x=given)
        engine(x=row(2, 2, 2, 2, 2))
    assert (first.tolist(), given.tolist()) == ([[2] * 5], [[1] * 5])


def test_engines_with_state_are_not_recorded(opened):
    _, engine = opened(FakeEngine(doubled), (FIXED,), component((X, CACHE), (Y, NEXT)))
    assert not engine.replays


# -- what it was built for


def manifest(build=BUILD):
    source = Source("checkpoint", "official", "0")
    command = "wan-trt build bundle engines --target rtx4090"
    return Manifest("engines", SPECS["t2v-a14b-tiny"], Precision.BF16, (), (), source, command, build=build)


def test_a_plan_that_was_built_for_something_else_is_not_run(opened):
    device, engine = opened(paper := FakeEngine(doubled))
    device.manifest = manifest()
    paper.name = Stamp("rtx5090", Precision.BF16, (FIXED,)).name
    with pytest.raises(UserError, match=r"dit.plan was built for target rtx5090 \| expected rtx4090"), engine:
        pass
    paper.name = Stamp("rtx4090", Precision.BF16, (FIXED,)).name
    with engine:
        assert engine(x=row(1)).tolist() == [[2]]


def test_missing_cupy_names_its_package(monkeypatch):
    monkeypatch.setitem(engine_tensorrt.MODULES, "tensorrt-rtx", "json")
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(UserError, match=r"cannot import cupy .* pip install cupy-cuda13x"):
        Device.open(manifest())


# -- the real API

USED_ON = {
    "context": "IExecutionContext", "_context": "IExecutionContext", "engine": "ICudaEngine", "_engine": "ICudaEngine",
    "runtime": "Runtime", "config": "IRuntimeConfig", "_cache": "IRuntimeCache",
}  # fmt: skip


def test_every_name_that_is_used_exists_in_the_installed_module():
    trt = pytest.importorskip("tensorrt_rtx", reason="the API of an installed TensorRT")
    used = set()
    parsed = [ast.parse(inspect.getsource(module)) for module in (engine_tensorrt, rtx)]
    for node in (node for tree in parsed for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner in USED_ON:
                used.add((USED_ON[owner], node.attr))
            if owner == "trt":
                used.add(("", node.attr))
    cupys = {"CUDARuntimeError", "memGetInfo", "getDevice", "getDeviceProperties", "driverGetVersion"}
    used -= {("", "__version__"), *(("Runtime", name) for name in cupys)}
    missing = [name for name in used if not hasattr(getattr(trt, name[0]) if name[0] else trt, name[1])]
    assert len(used) > 14
    assert missing == []


@pytest.mark.gpu
def test_a_real_engine_computes_what_numpy_computes(tmp_path):
    cupy = pytest.importorskip("cupy", reason="needs CuPy and a CUDA device")
    try:
        capability = cupy.cuda.Device().compute_capability
    except cupy.cuda.runtime.CUDARuntimeError:
        pytest.skip("no CUDA device")
    from engines.gpu.tensorrt_backend import EngineOptions, build_engine
    from engines.targets import TARGETS
    from tests.engines.gpu.test_tensorrt_backend import mlp

    trt = pytest.importorskip("tensorrt_rtx" if capability in ("86", "89", "120") else "tensorrt")
    backend = "tensorrt-rtx" if trt.__name__ == "tensorrt_rtx" else "tensorrt"
    target = replace(TARGETS["rtx4090"], backend=backend, compute_capability=f"{capability[:-1]}.{capability[-1]}")
    graph, inputs = mlp(tmp_path)
    build_engine(graph, tmp_path / "dit.plan", EngineOptions(target, (RANGE,), inputs))
    outputs = (Tensor("y", "float32", ("frames", 64)),)
    x = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    with Device(trt, cupy) as device, device.engine(tmp_path, component(inputs, outputs), (RANGE,)) as engine:
        once, twice = engine(x=x), engine(x=x)
    assert once.shape == (5, 64)
    assert np.array_equal(once, twice)
