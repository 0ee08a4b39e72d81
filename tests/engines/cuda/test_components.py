"""Bundles for the CUDA provider: complete, priced, refused where they would be slow; the VAE computes the same."""

import numpy as np
import pytest

from engines.build import BuildOptions, build_engines
from engines.disk_space import disk_bytes
from engines.inspect.inspection import inspect_engines
from engines.plan import make_plan
from engines.targets import check_precision, target_named
from export.exporter import export_checkpoint
from export.options import ExportOptions
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from triton_repo.driver import gpus
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS
from wan_trt.cli import app as wan_trt

CPU = ("CPUExecutionProvider",)


@pytest.fixture(scope="module")
def half(tmp_path_factory, tiny_checkpoint):
    """An fp16 bundle, and the engines for CUDA made from it."""
    root = tmp_path_factory.mktemp("cuda")
    export_checkpoint(tiny_checkpoint, root / "onnx", ExportOptions(Precision.FP16))
    build_engines(root / "onnx", root / "engines", BuildOptions("cuda"))
    return root / "onnx", root / "engines"


def test_the_manifest_lists_all_nodes_and_what_they_need(half):
    manifest = open_bundle(half[1], "engines", full_check=True).manifest
    build = manifest.build
    assert (build.target, build.backend, build.backend_version) == ("cuda", "onnxruntime-gpu", "1.25")
    assert build.compute_capability == "8.0"
    assert build.profiles == ()
    assert set(build.nodes) == set(manifest.spec.components)
    assert f"{2 * manifest.spec.dit.layers} Attention FLOAT16" in build.nodes["high_noise"]


def test_the_disk_is_priced_at_what_a_build_writes(half):
    written = sum(path.stat().st_size for path in half[1].rglob("*"))
    price = disk_bytes(open_bundle(half[0], "graphs").manifest, target_named("cuda"), in_blocks=False)
    assert written < price < 1.5 * written


def test_the_vae_in_an_older_opset_computes_the_same_bits(half):
    results = []
    for folder, kind in ((half[0], "graphs"), (half[1], "engines")):
        component = open_bundle(folder, kind).component("vae_decoder_first")
        latents = np.random.default_rng(0).standard_normal((1, 16, 1, 4, 6), dtype=np.float32)
        with OnnxRuntimeEngine(folder, component, (), CPU) as engine:
            results.append(engine(latents=latents))
    for exported, fitted in zip(*results, strict=True):
        assert np.array_equal(exported, fitted)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP8])
def test_a_bundle_in_another_precision_is_refused_before_anything_is_written(tmp_path, tiny_checkpoint, precision):
    export_checkpoint(tiny_checkpoint, tmp_path / "onnx", ExportOptions(precision))
    with pytest.raises(UserError, match=rf"precision {precision} for cuda \(.*\) \| expected bf16, fp16 \| .*bf16"):
        build_engines(tmp_path / "onnx", tmp_path / "engines", BuildOptions("cuda"))
    assert not (tmp_path / "engines").exists()


def test_there_are_no_compiled_kernels_to_inspect(half):
    with pytest.raises(UserError, match="engines for ONNX Runtime"):
        inspect_engines(half[1])


@pytest.mark.parametrize("options", [{"size": "128x64"}, {"topology": "blocks"}])
def test_options_of_other_backends_are_refused(tmp_path, half, options):
    with pytest.raises(UserError, match="for target cuda"):
        build_engines(half[0], tmp_path / "engines", BuildOptions("cuda", **options))


def test_a_card_gives_a_plan_its_figures():
    plan, unknown = (make_plan(SPECS["t2v-a14b"], target_named(name), Precision.BF16) for name in ("cuda:h100", "cuda"))
    assert plan.residency == "one-expert"
    assert plan.step_seconds == pytest.approx(2 * 6.523e15 / 989.5e12, rel=0.01)
    assert plan.engines_bytes == plan.bundle_bytes
    assert unknown.step_seconds is None


def test_a_card_that_is_not_in_the_table_is_refused():
    with pytest.raises(UserError, match=r"target 'cuda:cpu' \| .* cuda, cuda:GPU"):
        target_named("cuda:cpu")
    with pytest.raises(UserError, match=r"target 'cuda:' \|"):
        target_named("cuda:")
    with pytest.raises(UserError, match="no products of 8 or 4 bits"):
        check_precision(target_named("cuda:h100"), Precision.FP8_ATTN)


@pytest.mark.skipif(gpus() > 0, reason="needs a machine without a GPU")
def test_a_server_without_a_gpu_refuses_them_before_it_starts(half, capsys):
    with pytest.raises(SystemExit) as left:
        wan_trt(["serve", str(half[1])])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        f"wan-trt: {half[1]} for cuda, and no usable NVIDIA GPU here | expected a GPU and its driver"
    )
