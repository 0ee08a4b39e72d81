"""A graph that a compiler cannot load, or dies of, is refused in one line by a build; the process goes on."""

import shutil
import sys
from dataclasses import replace

import onnx
import pytest

from engines import load_check
from engines.build import BuildOptions, build_engines
from engines.load_check import check_loads
from engines.targets import TARGETS
from wan22.bundle import file_entry, open_bundle, write_manifest
from wan22.errors import UserError


def cut(content):
    return content[: len(content) // 2]


def no_onnx(_):
    return b"<html>"


def unknown_operator(content):
    model = onnx.load_model_from_string(content)
    model.graph.node[0].op_type = "NoSuchOperator"
    return model.SerializeToString()


def wrong_shape(content):
    model = onnx.load_model_from_string(content)
    stored = [tensor for tensor in model.graph.initializer if tensor.external_data and len(tensor.dims) == 2]
    stored[0].dims[:] = [3, 5]
    return model.SerializeToString()


@pytest.fixture
def damaged(tmp_path, tiny_bundle):
    """``damaged(how)`` → a bundle with the text encoder's graph changed, its manifest written again."""

    def made(how):
        folder = tmp_path / "onnx"
        shutil.copytree(tiny_bundle, folder)
        path = folder / "text_encoder.onnx"
        path.write_bytes(how(path.read_bytes()))
        manifest = open_bundle(tiny_bundle, "graphs").manifest
        components = tuple(
            replace(c, graph=file_entry(folder, path)) if c.name == "text_encoder" else c for c in manifest.components
        )
        write_manifest(folder, replace(manifest, components=components))
        return folder

    return made


@pytest.mark.parametrize("how", [cut, no_onnx, unknown_operator, wrong_shape])
def test_a_damaged_graph_is_refused_for_the_cpu(damaged, tmp_path, how):
    with pytest.raises(UserError, match=r"text_encoder\.onnx (does not load|is damaged)"):
        build_engines(damaged(how), tmp_path / "engines")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_damaged_graph_is_refused_for_a_gpu(tmp_path, tiny_bundle):
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "text_encoder.onnx"
    path.write_bytes(unknown_operator((tiny_bundle / "text_encoder.onnx").read_bytes()))
    shutil.copy(tiny_bundle / "text_encoder.safetensors", tmp_path)
    with pytest.raises(
        UserError, match=r"text_encoder\.onnx does not parse: relative_buckets/Shape.*operators TensorRT supports"
    ):
        check_loads(TARGETS["rtx4090"], [path], "export again")


def test_a_compiler_that_dies_is_told_with_the_graph_and_its_signal(tmp_path, monkeypatch):
    child = "import os, signal; print('graph a.onnx'); print('graph b.onnx', flush=True); os.kill(os.getpid(), 11)"
    monkeypatch.setattr(load_check, "CHILD", child)
    with pytest.raises(UserError, match=r"b\.onnx crashes onnxruntime with signal 11 .* \| export again"):
        check_loads(TARGETS["cpu"], [tmp_path / "a.onnx", tmp_path / "b.onnx"], "export again")


def test_a_fault_of_the_check_itself_is_a_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(load_check, "CHILD", "raise ValueError('ours')")
    with pytest.raises(RuntimeError, match="ours"):
        check_loads(TARGETS["cpu"], [tmp_path / "a.onnx"], "")


def test_nothing_of_the_working_folder_is_run(tmp_path, tiny_bundle, monkeypatch):
    (tmp_path / "engines").mkdir()
    for planted in ("engines/__init__.py", "engines/load_check.py", "onnxruntime.py", "json.py"):
        (tmp_path / planted).write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    assert sys.executable
    build_engines(tiny_bundle, tmp_path / "made", BuildOptions("cpu"))
