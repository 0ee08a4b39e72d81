"""The device of PyTorch's side, and that all its tensors are there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.checkpoint.checkpoint import open_checkpoint
from runtime.request import Request
from validate.bench.torch_side import TorchSide
from validate.bench.work import TEXT, BenchOptions, work_for
from validate.reference import reference
from validate.reference.device import Residence, catch_out_of_memory, reference_device
from validate.reference.reference import ImageInputs, Reference
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan_trt.cli import app


@pytest.fixture
def manifest(tiny_engines):
    return open_bundle(tiny_engines, "engines").manifest


@pytest.mark.parametrize(
    ("backend", "has_gpu", "choice", "device"),
    [
        ("onnxruntime", True, "auto", "cpu"),
        ("tensorrt", False, "auto", "cpu"),
        ("tensorrt", True, "auto", "cuda"),
        ("tensorrt", True, "cpu", "cpu"),
        ("onnxruntime", True, "cuda", "cuda"),
    ],
)
def test_the_device_follows_the_engines_unless_it_is_chosen(manifest, monkeypatch, backend, has_gpu, choice, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    built = replace(manifest, build=replace(manifest.build, backend=backend))
    assert reference_device(choice, built) == device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["validate", "bench"])
def test_a_gpu_that_pytorch_does_not_see_is_reported_before_any_work(tiny_engines, tiny_checkpoint, capsys, command):
    with pytest.raises(SystemExit) as left:
        app([command, str(tiny_engines), str(tiny_checkpoint), "--reference-device", "cuda"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("wan-trt: --reference-device cuda, but PyTorch sees no GPU | expected")


class Moved:
    """A module that records its device."""

    where = "cpu"

    def to(self, device):
        self.where = device
        return self


def test_one_module_at_a_time_is_on_the_gpu():
    residence, one, other = Residence("cuda"), Moved(), Moved()
    residence.place(one)
    assert (residence.place(one).where, residence.place(other).where, one.where) == ("cuda", "cuda", "cpu")
    residence.release(other)
    residence.place(one)
    assert (one.where, other.where) == ("cuda", "cuda")  # a module that is released is not moved back first


def test_a_gpu_that_is_too_small_is_reported_with_a_remedy():
    with pytest.raises(UserError, match=r"CUDA out of memory.*--reference-device cpu"), catch_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")


class OnMeta(Residence):
    """PyTorch's meta device: like a GPU, it does not mix its tensors with those of the CPU."""

    def place(self, module):
        return module.to("meta")


@pytest.mark.parametrize("model", ["i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_no_tensor_of_the_reference_stays_on_the_cpu(flow_of, monkeypatch, model):
    found = []
    monkeypatch.setattr(reference, "to_numpy", lambda x: found.append(x) or np.zeros(tuple(x.shape), np.float32))
    side = Reference(open_checkpoint(flow_of(model).checkpoint), residence=OnMeta("meta"))
    latents = np.zeros(side.spec.latent_shape(64, 64, 5), np.float32)
    text = np.zeros((1, 512, side.spec.dit.text_width), np.float32)
    condition = side.condition(np.zeros((1, 3, 64, 64), np.float32), 5)
    for given in (condition.image_inputs, *([ImageInputs()] if model.startswith("ti2v") else [])):
        side.velocity(side.spec.experts[0], latents, 500.0, text, given)
    side.decode(latents)
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_no_tensor_of_a_bench_stays_on_the_cpu(flow_of):
    flow = flow_of("i2v-a14b-tiny")
    bundle = open_bundle(flow.engines, "engines")
    work = work_for(bundle, BenchOptions(Request(size=(32, 32), frames=5)))
    side = TorchSide(open_checkpoint(flow.checkpoint), bundle.manifest, work, device="meta")
    for piece in set(work.pieces) - {TEXT}:
        side.open(piece)
        (tensor,) = side.chunks(piece)
        assert tensor.device.type == "meta"
