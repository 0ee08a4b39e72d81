"""A pipeline opens the backend that built its engines, or says what is missing."""

import shutil
from dataclasses import replace

import pytest

from runtime.pipeline import Pipeline
from wan22.bundle import open_bundle, write_manifest
from wan22.errors import UserError


@pytest.fixture
def edited(tmp_path, tiny_engines):
    """``edited(backend)`` → the tiny engines with another backend in their manifest."""

    def copy(backend):
        shutil.copytree(tiny_engines, tmp_path / "engines")
        manifest = open_bundle(tiny_engines, "engines").manifest
        write_manifest(tmp_path / "engines", replace(manifest, build=replace(manifest.build, backend=backend)))
        return tmp_path / "engines"

    return copy


def test_an_unknown_backend_lists_the_known_ones(edited):
    with pytest.raises(
        UserError, match=r"backend 'openvino' \| expected one of onnxruntime, onnxruntime-gpu, tensorrt"
    ):
        Pipeline.open(edited("openvino"))


def test_tensorrt_engines_without_gpu_packages_say_what_to_install(edited):
    try:
        import cupy  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install"):
            Pipeline.open(edited("tensorrt-rtx"))
    else:
        pytest.skip("cupy is installed: the GPU tests cover this machine")


def test_engines_are_opened_once_and_released(tiny_engines):
    with Pipeline.open(tiny_engines) as pipeline:
        engine = pipeline.engine("text_encoder")
        assert pipeline.engine("text_encoder") is engine
        pipeline.release("text_encoder")
        assert pipeline.engine("text_encoder") is not engine
        with pytest.raises(UserError, match="component 'dit'"):
            pipeline.engine("dit")
