"""The builder compiles ONNX files for absent GPUs, keeps its log, and reports failures clearly."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from engines.gpu import tensorrt_backend
from engines.gpu.tensorrt_backend import EngineOptions, build_engine, load_module, log_beside
from engines.profiles import profiles_for
from engines.targets import TARGETS
from export.graphs.builder import BFLOAT16, FLOAT, GraphBuilder, Placed
from wan22.errors import UserError
from wan22.specs import SPECS

trt = pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")
RTX4090 = TARGETS["rtx4090"]


def mlp(folder, op="Gelu"):
    """A graph of ``y [frames, 64] = op(x) · w`` with external weights."""
    g = GraphBuilder("mlp")
    x = g.input("x", FLOAT, ["frames", 64])
    with g.scope("blocks.0"):
        y = g.op("MatMul", g.cast(g.op(op, x), BFLOAT16), g.weight("w", (64, 64), BFLOAT16))
    g.output("y", g.cast(y, FLOAT), ["frames", 64])
    (folder / "w.bin").write_bytes(np.random.default_rng(0).bytes(64 * 64 * 2))
    g.bind({"w": Placed("w.bin", 0, 64 * 64 * 2)}, folder)
    g.save(folder / "mlp.onnx")
    return folder / "mlp.onnx", g.edges()[0]


def options_for(inputs, target=RTX4090):
    return EngineOptions(target, profiles_for(SPECS["t2v-a14b-tiny"], "256x160", "5..17"), inputs)


def test_an_engine_for_a_gpu_elsewhere_with_its_log_beside_it(tmp_path):
    graph, inputs = mlp(tmp_path)
    seen = []
    built = build_engine(graph, tmp_path / "mlp.engine", options_for(inputs), lambda *call: seen.append(call))
    assert built.path.stat().st_size == built.size_bytes > 1000
    assert "Layers:" in built.log.read_text()
    assert "MinShape: [2,64], OptShape: [5,64], MaxShape: [5,64]" in built.log.read_text()
    assert seen[-1][1] == seen[-1][2] > 1
    assert sorted(p.suffix for p in tmp_path.glob("mlp.*")) == [".engine", ".log", ".onnx"]


def test_the_plan_keeps_the_name_of_its_network(tmp_path):
    graph, inputs = mlp(tmp_path)
    built = build_engine(graph, tmp_path / "mlp.engine", replace(options_for(inputs), name="wan-trt {of a test}"))
    assert b"wan-trt {of a test}" in built.path.read_bytes()


def test_several_sizes_are_several_optimisation_profiles(tmp_path):
    graph, inputs = mlp(tmp_path)
    short, long = (profiles_for(SPECS["t2v-a14b-tiny"], "256x160", frames) for frames in ("5", "17"))
    options = replace(options_for(inputs), profiles=(*short, *long))
    log = build_engine(graph, tmp_path / "mlp.engine", options).log.read_text()
    assert (log.count("OptShape: [2,64]"), log.count("OptShape: [5,64]")) == (1, 1)


def test_an_operator_that_is_not_known_is_named_with_its_node(tmp_path):
    graph, inputs = mlp(tmp_path, op="Unheard")
    with pytest.raises(UserError, match=r"mlp.onnx does not parse: blocks.0/Unheard"):
        build_engine(graph, tmp_path / "mlp.engine", options_for(inputs))
    assert not (tmp_path / "mlp.engine").exists()


def test_a_build_that_fails_repeats_the_builders_last_error(tmp_path):
    graph, inputs = mlp(tmp_path)
    no_bf16 = replace(RTX4090, name="rtx2080", compute_capability="7.5")
    with pytest.raises(UserError, match=r"cannot build mlp.onnx: .*sm75.*see|cannot build mlp.onnx: .*b16"):
        build_engine(graph, tmp_path / "mlp.engine", options_for(inputs, no_bf16))
    assert log_beside(tmp_path / "mlp.engine").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_architecture_that_the_module_cannot_compile_for_is_refused(tmp_path):
    graph, inputs = mlp(tmp_path)
    hopper = replace(TARGETS["h100"], backend="tensorrt-rtx")
    with pytest.raises(UserError, match=r"h100 \(SM90\)"):
        build_engine(graph, tmp_path / "mlp.engine", options_for(inputs, hopper))


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_the_build_and_leaves_no_engine_and_no_builder_at_work(tmp_path, presses):
    graph, inputs = mlp(tmp_path)
    pressed = []

    def progress(*_):
        if len(pressed) < presses:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # until the waiting thread receives it

    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, tmp_path / "mlp.engine", options_for(inputs), progress)
    assert len(pressed) == presses
    assert not any(thread.name.startswith("engine-builder") for thread in threading.enumerate())
    assert not list(tmp_path.glob("*.engine")) + list(tmp_path.glob("*.partial"))


def test_the_monitor_asks_the_builder_to_stop_once_cancelled():
    monitor = tensorrt_backend._monitor(trt, "x", lambda *_: None)
    assert monitor.step_complete("any", 0)
    monitor.cancelled = True
    assert not monitor.step_complete("any", 1)


@pytest.mark.parametrize(("backend", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx")])
def test_a_missing_module_names_the_package_to_install(monkeypatch, backend, package):
    monkeypatch.setitem(tensorrt_backend.MODULES, backend, "no_such_module_anywhere")
    with pytest.raises(UserError, match=f"cannot import no_such_module_anywhere.*pip install {package}$"):
        load_module(backend)


def test_an_old_tensorrt_is_refused(monkeypatch):
    monkeypatch.setitem(tensorrt_backend.MODULES, "tensorrt", "tensorrt_rtx")  # 1.x, older than 10.13
    with pytest.raises(UserError, match=r"tensorrt 1\.\d.*10.13 or later"):
        load_module("tensorrt")


def test_tf32_is_off_unless_asked_for():
    assert EngineOptions(RTX4090, (), ()).tf32 is False
