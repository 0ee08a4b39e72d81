"""The CUDA engine: real ONNX Runtime sessions on arrays bound by address, in host memory for want of a GPU."""

import inspect
import re
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

import runtime.blocks_tensorrt
import runtime.engine_cuda
import runtime.engine_tensorrt
import runtime.gpu
import runtime.group_cuda
from engines.build import BuildOptions, build_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.engine_cuda import CUDA, SHAPE_ARITHMETIC, CudaDevice, check_assignment, check_onnxruntime
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.generate import generate
from runtime.request import Request
from tests.runtime.fake_gpu import DeviceArray, FakeCupy, Memory
from wan22.errors import UserError
from wan22.precision import Precision

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def half(tmp_path_factory, tiny_checkpoint):
    """fp16 engines for CUDA, with dynamic shapes and with fixed ones."""
    made = {}
    for name, fixed in (("dynamic", {}), ("fixed", {"size": (96, 64), "frames": 5})):
        root = tmp_path_factory.mktemp(name)
        export_checkpoint(tiny_checkpoint, root / "onnx", ExportOptions(Precision.FP16, **fixed))
        made[name] = build_engines(root / "onnx", root / "engines", BuildOptions("cuda"))
    return made


@pytest.fixture
def device():
    with CudaDevice(onnxruntime, FakeCupy(), CPU, "cpu") as opened:
        yield opened


def text_ids():
    return np.array([[5, 9, 3, 1]], np.int64)


def test_a_call_computes_what_onnxruntime_does_and_comes_back_as_numpy(half, device):
    bundle = half["dynamic"]
    component = bundle.component("text_encoder")
    with OnnxRuntimeEngine(bundle.folder, component, (), (CPU,)) as engine:
        expected = engine(input_ids=text_ids())
    with device.engine(bundle.folder, component) as engine:
        found = engine(input_ids=text_ids())
        there = engine(input_ids=device.cupy.asarray(text_ids()))
    assert type(found) is np.ndarray
    assert isinstance(there, DeviceArray)
    assert np.array_equal(found, expected)
    assert np.array_equal(np.asarray(there), expected)


def test_the_vaes_caches_never_leave_the_device(half, device):
    bundle = half["dynamic"]
    first, step = (bundle.component(f"vae_decoder_{name}") for name in ("first", "next"))
    latents = np.random.default_rng(0).standard_normal((1, 16, 1, 4, 6), dtype=np.float32)
    with device.engine(bundle.folder, first) as begin, device.engine(bundle.folder, step) as go_on:
        frames, *caches = begin(latents=latents)
        assert type(frames) is np.ndarray
        assert {type(cache) for cache in caches} == {DeviceArray}
        names = [tensor.name for tensor in step.inputs if tensor.name.startswith("cache")]
        frames, *caches = go_on(latents=latents, **dict(zip(names, caches, strict=True)))
        assert frames.shape[2] == 4
        assert {type(cache) for cache in caches} == {DeviceArray}


def test_fixed_shapes_without_state_are_recorded_at_fixed_addresses(half, device):
    def addresses(bundle):
        engine, bound = device.engine(bundle.folder, bundle.component("high_noise")), []
        inputs = {
            tensor.name: np.zeros([2 if isinstance(dim, str) else dim for dim in tensor.dims], tensor.dtype)
            for tensor in engine.inputs
        }
        if not engine.replays:
            inputs |= {"rope_cos": np.zeros((2, 1, 1, inputs["rope_cos"].shape[-1]), np.float32)}
            inputs |= {"rope_sin": inputs["rope_cos"]}
        place = engine._place
        engine._place = lambda array: bound.append(place(array)) or bound[-1]
        with engine:
            engine(**inputs)
            half_way = len(bound)
            engine(**inputs)
        return engine.replays, [args[-1] for args in bound[:half_way]] == [args[-1] for args in bound[half_way:]]

    assert addresses(half["fixed"]) == (True, True)
    assert device.engine(half["dynamic"].folder, half["dynamic"].component("high_noise")).replays is False
    decoder = half["fixed"].component("vae_decoder_next")
    assert device.engine(half["fixed"].folder, decoder).replays is False


def test_out_of_memory_says_what_to_change(half):
    cupy = FakeCupy(memory=Memory(600_000))
    decoder, folder = half["dynamic"].component("vae_decoder_first"), half["dynamic"].folder
    refused = pytest.raises(UserError, match=r"no room for inputs and outputs of vae_decoder_first: .*--residency")
    with CudaDevice(onnxruntime, cupy, CPU, "cpu") as small, small.engine(folder, decoder) as engine, refused:
        engine(latents=np.zeros((1, 16, 1, 16, 16), np.float32))


def test_onnxruntimes_words_for_no_memory_are_known(half, device):
    bundle = half["dynamic"]
    engine = device.engine(bundle.folder, bundle.component("text_encoder"))
    for words in ("Failed to allocate memory for requested buffer", "CUDA failure 2: out of memory ; GPU=0"):
        assert "no room for text_encoder" in str(engine._explained(RuntimeError(words)))
    other = RuntimeError("illegal memory access")
    assert engine._explained(other) is other


# -- what a machine must have


def open_with(monkeypatch, half, cupy, **instead):
    fake = SimpleNamespace(**{"__version__": "1.31.1", "get_available_providers": lambda: [CUDA], **instead})
    modules = {"onnxruntime": fake, "cupy": cupy}
    monkeypatch.setattr("runtime.engine_cuda.require_module", lambda name, *_: modules[name])
    build = half["dynamic"].manifest.build
    return CudaDevice.open(build.backend_version, build.compute_capability)


def test_an_old_gpu_is_refused(monkeypatch, half):
    with pytest.raises(UserError, match=r"compute capability 7.5 \| expected 8.0 or later, for flash attention"):
        open_with(monkeypatch, half, FakeCupy("75"))
    assert open_with(monkeypatch, half, FakeCupy("120")).provider == CUDA


def test_an_old_onnxruntime_is_refused(monkeypatch, half):
    with pytest.raises(UserError, match=r"onnxruntime-gpu 1.24.4 \| expected 1.25 or later"):
        open_with(monkeypatch, half, FakeCupy(), __version__="1.24.4")


def test_the_package_for_cpus_is_refused_with_the_way_out(half):
    with pytest.raises(
        UserError, match=r"without a CUDA provider \| expected onnxruntime-gpu 1.25 or later \| pip unin"
    ):
        check_onnxruntime(onnxruntime, half["dynamic"].manifest.build.backend_version)


def test_a_provider_that_does_not_load_names_the_libraries_it_needs(half):
    """ONNX Runtime only logs it and runs on the CPU; so does this build, asked for a provider that it lacks."""
    with CudaDevice(onnxruntime, FakeCupy(), CUDA, "cpu") as opened:
        bundle = half["dynamic"]
        with pytest.raises(
            UserError, match=r"cannot load its CUDA provider \| expected CUDA .* and cuDNN 9 \| pip install"
        ):
            opened.engine(bundle.folder, bundle.component("text_encoder")).__enter__()


def test_work_on_the_cpu_is_refused_and_shape_arithmetic_is_not():
    def part(provider, *operators):
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=op) for op in operators])

    check_assignment("dit", CUDA, [part(CUDA, "Gemm", "Pad"), part(CPU, *SHAPE_ARITHMETIC)])
    with pytest.raises(UserError, match="dit: ONNX Runtime computes Gemm, Pad on the CPU"):
        check_assignment("dit", CUDA, [part(CUDA, "Mul"), part(CPU, "Shape", "Pad", "Gemm")])


def test_onnxruntime_tells_which_provider_computes_a_node(half, device):
    bundle = half["dynamic"]
    with device.engine(bundle.folder, bundle.component("text_encoder")) as engine:
        parts = engine._session.get_provider_graph_assignment_info()
    assert {part.ep_name for part in parts} == {CPU}
    assert "Attention" in {node.op_type for part in parts for node in part.get_nodes()}


def test_the_calls_exist_in_the_installed_bindings():
    assert list(inspect.signature(onnxruntime.IOBinding.bind_input).parameters)[1:] == [
        "name",
        "device_type",
        "device_id",
        "element_type",
        "shape",
        "buffer_ptr",
    ]
    assert list(inspect.signature(onnxruntime.IOBinding.bind_output).parameters)[1:4] == [
        "name",
        "device_type",
        "device_id",
    ]
    assert list(inspect.signature(onnxruntime.InferenceSession.run_with_iobinding).parameters)[1:] == [
        "iobinding",
        "run_options",
    ]
    assert hasattr(bindings.RunOptions, "add_run_config_entry")
    assert hasattr(onnxruntime, "preload_dlls")
    assert hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")


def test_tf32_is_off_and_the_stream_is_cupys():
    device = CudaDevice(onnxruntime, FakeCupy())
    options = device.provider_options(recorded=True)
    assert (options["use_tf32"], options["enable_cuda_graph"]) == ("0", "1")
    assert options["user_compute_stream"] == str(device.stream.ptr)
    assert int(options["gpu_mem_limit"]) == int(device.available_bytes())


# -- the whole pipeline


def test_a_video_is_that_of_the_exported_graphs(half, device, monkeypatch, tmp_path):
    """Both run in fp16 on CPU kernels: the fused operators change the last bits only."""
    bundle = half["dynamic"]
    build_engines(bundle.folder.parent / "onnx", tmp_path / "cpu", BuildOptions("cpu"))
    monkeypatch.setattr("runtime.engine_cuda.CudaDevice.open", lambda *_: device)
    request = Request("a lighthouse in a storm", size=(64, 48), frames=5, steps=2)
    results = [
        generate(folder, request, tmp_path / f"{number}.mp4").latents
        for number, folder in enumerate((bundle.folder, tmp_path / "cpu"))
    ]
    found, expected = map(np.asarray, results)
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-3


@pytest.mark.parametrize(
    "module",
    [runtime.engine_tensorrt, runtime.gpu, runtime.blocks_tensorrt, runtime.group_cuda],
)
def test_every_name_of_cupy_that_is_used_exists_in_it(module):
    cupy = pytest.importorskip("cupy", reason="the API of an installed CuPy")
    used = set(re.findall(r"(?<!\w)_?cupy((?:\.[A-Za-z_]+)+)\b", inspect.getsource(module)))
    for chain in used:
        owner = cupy
        for name in chain.removeprefix(".").split("."):
            owner = getattr(owner, name)
            if inspect.isroutine(owner):
                break
    assert used
