"""A package that is not installed is told in one line, with the extra that has it."""

import subprocess
import sys

import pytest

from wan_trt.cli import app
from wan_trt.extras import extras_with


@pytest.mark.parametrize(
    ("module", "extras"),
    [
        ("torch", ("export", "validate")),
        ("cupy", ("cuda", "gpu", "rtx")),
        ("onnx_ir", ("cpu", "cuda", "export", "gpu", "rtx")),
        ("onnxruntime", ("cpu",)),
        ("tritonclient.grpc", ("triton",)),
        ("google.protobuf", ("triton",)),
        ("numpy", ()),
        ("runtime", ()),
        ("no_such_module", ()),
    ],
)
def test_a_module_belongs_to_the_extras_that_declare_it(module, extras):
    assert tuple(sorted(extras_with(module))) == extras


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("onnx_ir", ["export", "CHECKPOINT", "b"], "export"),
        ("onnxruntime", ["generate", "ENGINES", "x", "-o", "x.mp4"], "cpu"),
        ("sentencepiece", ["synth", "t2v-a14b-tiny", "c"], "synth"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(tmp_path, tiny_checkpoint, tiny_engines, module, command, extra):
    places = {"CHECKPOINT": str(tiny_checkpoint), "ENGINES": str(tiny_engines)}
    words = [places.get(word, word) for word in command]
    code = f"import sys; sys.modules[{module!r}] = None; from wan_trt.cli import app; app({words!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"wan-trt: {module} is not installed | ")
    assert line.endswith(f"pip install 'wan-trt[{extra}]'")
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_our_own_that_is_missing_is_a_bug(monkeypatch):
    monkeypatch.setitem(sys.modules, "engines.plan", None)
    with pytest.raises(ModuleNotFoundError):
        app(["plan", "t2v-a14b", "--target", "h100"])
