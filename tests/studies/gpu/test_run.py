"""The GPU study: a dry run executes all stages on a CPU at tiny sizes and reports no measurements."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch

from export.checkpoint.schema import dit_tensors
from runtime.engine_cuda import CPU, CudaDevice
from runtime.forward_inputs import forward_inputs
from runtime.noise import standard_normal
from studies.gpu import __main__ as gpu_run
from studies.gpu import random_model
from studies.gpu.__main__ import NOT_MEASURED, STAGES
from studies.gpu.random_model import random_weights, transformer_engine
from studies.gpu.stage import StageResult, StageSettings
from tests.runtime.fake_gpu import DeviceArray, FakeCupy
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import TEXT_TOKENS, spec_named

COMMAND = [sys.executable, "-m", "studies.gpu"]
BY_NAME = {stage.name: stage for stage in STAGES}


def measured(name):
    return list(BY_NAME[name].measurements(StageSettings(dry_run=True)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path):
    done = subprocess.run([*COMMAND, "-o", tmp_path / "gpu.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no GPU that PyTorch can use | expected an NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_keeps_no_figure_and_says_that_nothing_was_measured(tmp_path):
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [*COMMAND, "--dry-run", "--only", "sampler", "-o", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["verdict"] == NOT_MEASURED
    assert NOT_MEASURED in done.stdout
    (stage,) = found["stages"]
    assert [row["what"] for row in stage["measurements"]] == ["numpy unipc", "numpy dpm++", "numpy euler"]
    assert {row["value"] for row in stage["measurements"]} == {None}


def figures(name):
    """The last measurement of each kind, by what it measures without the size of the video."""
    return {row.what.removeprefix("64x64, 5 frames, "): row for row in measured(name)}


@pytest.mark.parametrize("name", ["a14b-blocks", "5b-blocks"])
def test_both_sides_of_a_transformer_compute_the_same(name):
    rows = figures(name)
    assert rows["ONNX Runtime fp32, relative L2"].value < 1e-5
    assert rows["PyTorch"].value > 0
    assert rows["torch.compile"].value > 0
    assert rows["ONNX Runtime fp32, speed-up"].unit == "x"


def test_a_whole_transformer_says_how_many_blocks_it_has_and_is_compared():
    rows = figures("a14b")
    assert (rows["blocks"].value, rows["blocks"].note) == (2, "of 2")
    assert rows["ONNX Runtime fp32"].unit == "ms"
    assert rows["ONNX Runtime fp32, relative L2"].value < 1e-5


def test_the_provider_is_asked_for_its_kernels_and_without_a_gpu_has_none():
    rows = figures("cuda")
    assert rows["ONNX Runtime"].note.startswith(onnxruntime.__version__)
    assert "CPUExecutionProvider" in rows["providers"].note
    assert rows["attention fp32"].value > 0
    assert rows["attention fp32, kernel"].note == "no flash attention: none: no GPU"


def test_a_swap_is_timed_from_both_kinds_of_memory():
    rows = figures("swap")
    assert {rows[f"from {kind} memory"].unit for kind in ("pinned", "pageable")} == {"GB/s"}
    assert rows["an expert in fp8, from pinned memory"].note == "computed"


def test_a_video_is_made_from_noise_to_file():
    rows = figures("video")
    assert rows["video"].value > 0
    assert rows["decode and write"].note == "5 frames of 64x64"
    assert rows["50 steps and decoder"].note == "extrapolated"


def test_on_a_gpu_arrays_lie_where_the_engine_computes(tmp_path, monkeypatch):
    """The engine for CUDA, with host memory for the GPU's: the same bits as the engine for the CPU."""
    spec = spec_named("t2v-a14b-tiny")
    weights = random_weights(dit_tensors(spec.dit), "cpu", torch.float32, 0)
    monkeypatch.setattr(random_model, "open_device", lambda: CudaDevice(onnxruntime, FakeCupy(), CPU, "cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    latents = standard_normal(spec.latent_shape(64, 64, 5), 0)
    inputs = forward_inputs(spec.dit, latents, 900.0, standard_normal((1, TEXT_TOKENS, spec.dit.text_width), 1))
    found = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        making = transformer_engine(spec, dict(weights), tmp_path / device, Precision.FP32, device)
        with making as (engine, place):
            given = place(inputs)
            found[device] = engine(**given)
            assert isinstance(given["latents"], DeviceArray) == (device == "cuda")
    assert isinstance(found["cuda"], DeviceArray)
    assert np.abs(np.asarray(found["cuda"]) - found["cpu"]).max() < 1e-6


def test_the_decoder_is_timed_on_both_sides_with_its_peak_memory():
    assert [(row.what, row.unit) for row in measured("vae")] == [
        ("ONNX Runtime", "ms"),
        ("ONNX Runtime, peak memory", "GiB"),
        ("PyTorch", "ms"),
        ("PyTorch, peak memory", "GiB"),
    ]


def test_a_tensorrt_rtx_engine_is_built_and_where_there_is_no_gpu_not_loaded():
    version, built, loads = measured("rtx")
    assert version.note
    assert (built.what, built.unit) == ("built", "s")
    assert (loads.value, loads.note) == (None, "not tried: no GPU")


def test_a_stage_that_hangs_leaves_half_of_the_time_to_the_others(monkeypatch):
    limits = []
    monkeypatch.setattr(gpu_run, "run_stage", lambda answer, setting, limit_s: limits.append(limit_s))
    answers = [StageResult(stage) for stage in STAGES[:3]]
    for _ in gpu_run._measure(answers, StageSettings(dry_run=True), time.monotonic() + 600):
        pass
    assert limits == pytest.approx([300, 300, 600], rel=0.01)


def test_an_engine_for_the_gpu_never_runs_on_the_cpu_instead():
    with pytest.raises(UserError, match=r"without a CUDA provider|cannot import cupy"):
        random_model.open_device()


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    asked = [*COMMAND, "--dry-run", "-o", tmp_path]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"python -m studies.gpu: output {tmp_path}: a folder")


def test_an_unknown_stage_is_refused(tmp_path):
    command = [*COMMAND, "--dry-run", "--only", "vea", "-o", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m studies.gpu: stage 'vea' | expected one of cuda, rtx, sampler, ")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_ends_early_writes_its_results(tmp_path, how):
    file = tmp_path / "gpu.json"
    running = subprocess.Popen([*COMMAND, "--dry-run", "-o", file], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline().startswith("1/10")
    time.sleep(0.5)
    running.send_signal(how)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert [stage["status"] for stage in json.loads(file.read_text())["stages"]] == ["interrupted", *["skipped"] * 9]
