"""Files that do not belong together, unfinished downloads, folders of other tools: read, or refused by name."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.keys import diffusers_names
from export.checkpoint.schema import part_tensors
from export.synth.checkpoint import synthesise
from tests.export.checkpoint.forms import format_1, fp8_scaled, save, tensors_of
from wan22.errors import UserError
from wan22.specs import spec_named

T2V, TI2V = spec_named("t2v-a14b-tiny"), spec_named("ti2v-5b-tiny")
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for spec, layout in ((T2V, "official"), (TI2V, "official"), (TI2V, "diffusers")):
        synthesise(spec, root / spec.name / layout, layout, seed=11)
    return root


@pytest.fixture(scope="module")
def t2v(bases):
    return bases / T2V.name / "official"


def refused(where, words):
    with pytest.raises(UserError, match=words) as error:
        open_checkpoint(where)
    assert "\n" not in str(error.value)


# Parts that do not belong together


def test_a_name_that_contradicts_its_expert_is_warned_about(t2v, tmp_path, caplog):
    paths = {
        expert: save(tmp_path / f"wan2.2_t2v_{named}_noise_fp16.safetensors", tensors_of(t2v, expert))
        for expert, named in (("high_noise", "low"), ("low_noise", "high"))
    }
    with caplog.at_level(logging.WARNING):
        open_checkpoint(f"{t2v},high_noise={paths['high_noise']},low_noise={paths['low_noise']}")
    assert (
        "wan2.2_t2v_low_noise_fp16.safetensors is named low noise and is read as the high-noise expert" in caplog.text
    )
    assert "wan2.2_t2v_high_noise_fp16.safetensors is named high noise and is read as the low-noise" in caplog.text


def test_one_expert_given_twice_is_warned_about(t2v, tmp_path, caplog):
    path = save(tmp_path / "merged.safetensors", tensors_of(t2v, "high_noise"))
    with caplog.at_level(logging.WARNING):
        open_checkpoint(t2v)
        open_checkpoint(f"{t2v},high_noise={path}")
        assert not caplog.messages
        open_checkpoint(f"{t2v},low_noise={path}")
    assert "both experts are the same weights" in caplog.text


def test_the_vae_or_text_encoder_of_another_model(bases, t2v, tmp_path):
    vae = save(tmp_path / "vae.safetensors", tensors_of(bases / TI2V.name / "official", "vae"))
    refused(f"{t2v},vae={vae}", r"transformer with 16 input and 16 output channels .* 48 and 48 for t2v and this VAE")
    narrow = replace(T2V, text_encoder=replace(T2V.text_encoder, width=64))
    text = {name: torch.ones(shape) for name, shape in part_tensors("text_encoder", narrow).items()}
    path = save(tmp_path / "umt5.safetensors", text)
    tokenizer = t2v / "google/umt5-xxl"
    refused(f"{t2v},text_encoder={path},tokenizer={tokenizer}", r"text encoder of width 64 \| expected 128")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_one_scale_of_a_hundred_without_sense(t2v, tmp_path, value):
    tensors, _ = fp8_scaled(tensors_of(t2v, "high_noise"))
    key = "blocks.1.cross_attn.k.scale_weight"
    tensors = {k: t for k, t in tensors.items() if k != key} if value is None else tensors | {key: torch.tensor(value)}
    path = save(tmp_path / "x.safetensors", tensors)
    words = r"cross_attn\.k\.weight is .*without its scale" if value is None else f"{key} holds the scale {value:g}"
    refused(f"{t2v},high_noise={path}", words)


@pytest.mark.parametrize("code", [0x7F, 0x81])
def test_block_scales_that_are_no_scales_are_refused_when_they_are_read(t2v, tmp_path, code):
    key = "blocks.0.ffn.0"
    tensors = tensors_of(t2v, "high_noise")
    rows, inputs = tensors[f"{key}.weight"].shape
    blocks = torch.full((rows, inputs // 16), 0x38, dtype=torch.uint8)
    blocks[5, 3] = code
    tensors[f"{key}.weight"] = torch.zeros(rows, inputs // 2, dtype=torch.uint8)
    tensors[f"{key}.weight_scale"] = blocks.view(torch.float8_e4m3fn)
    tensors[f"{key}.weight_scale_2"] = torch.tensor(0.5)
    where = f"{t2v},high_noise={save(tmp_path / 'x.safetensors', tensors)}"
    with pytest.raises(UserError, match=r"holds the scale|negative or NaN"):
        open_checkpoint(where).weights["high_noise"].read(f"{key}.weight")


# What downloads and other tools leave


def test_an_interrupted_download_is_resumed(t2v, tmp_path):
    folder = shutil.copytree(t2v, tmp_path / "checkpoint")
    unfinished = folder / ".cache/huggingface/download/high_noise_model"
    unfinished.mkdir(parents=True)
    (folder / "high_noise_model" / SHARD).rename(unfinished / "Xk3J9.0a1b2c.incomplete")
    refused(folder, f"{SHARD} is missing .* interrupted and will resume")


def test_an_index_that_is_left_over_beside_the_whole_file(t2v, tmp_path):
    folder = shutil.copytree(t2v, tmp_path / "checkpoint") / "high_noise_model"
    tensors = tensors_of(t2v, "high_noise")
    for path in folder.glob("*-of-*"):
        path.unlink()
    save(folder / "diffusion_pytorch_model.safetensors", {name: 2 * tensor for name, tensor in tensors.items()})
    found = open_checkpoint(folder.parent).weights["high_noise"]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.read(name), 2 * tensor.numpy())


def test_an_index_with_wrong_bytes_in_a_field_that_nobody_reads(t2v, tmp_path):
    folder = shutil.copytree(t2v, tmp_path / "checkpoint")
    index = folder / "high_noise_model/diffusion_pytorch_model.safetensors.index.json"
    content = index.read_bytes()
    index.write_bytes(content.replace(b"{", b'{"note": "\xe6(", ', 1))
    refused(folder, r"index\.json: .* expected the index as JSON")
    index.write_bytes(content.replace(b"model-00002", b"9" * 400 + b"model-00002"))
    refused(folder, r"index\.json names the file 'diffusion_pytorch_9+' ")


def test_what_modelscope_leaves_is_passed_over(t2v, tmp_path):
    folder = shutil.copytree(t2v, tmp_path / "Wan2___2-T2V-A14B")
    (folder / "configuration.json").write_text('{"framework": "pytorch", "allow_remote": true}')
    for name in (".msc", ".mv", ".mdl"):
        (folder / name).write_bytes(b"\x80\x04]\x94.")
    (folder / "._____temp/high_noise_model").mkdir(parents=True)
    (folder / "._____temp/high_noise_model" / SHARD).write_bytes(bytes(100))
    assert open_checkpoint(folder).source.fingerprint == open_checkpoint(t2v).source.fingerprint


@pytest.mark.parametrize("name", ["WanDMDPipeline", "WanSomethingPipeline"])
def test_the_class_of_a_pipeline_does_not_decide(bases, tmp_path, name):
    """FastWan is an ordinary TI2V-5B: its tensors say so."""
    folder = shutil.copytree(bases / TI2V.name / "diffusers", tmp_path / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).spec == TI2V


def test_every_part_may_have_another_type(bases, tmp_path):
    folder = shutil.copytree(bases / TI2V.name / "diffusers", tmp_path / "checkpoint")
    types = {"transformer": torch.float16, "text_encoder": torch.float32, "vae": torch.bfloat16}
    expected = {part: tensors_of(folder, part) for part in ("dit", "text_encoder", "vae")}
    for part, dtype in types.items():
        for path in [*(folder / part).glob("*.safetensors"), *(folder / part).glob("*.index.json")]:
            path.unlink()
        names = diffusers_names("dit" if part == "transformer" else part, TI2V)
        tensors = expected["dit" if part == "transformer" else part]
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save(folder / part / f"{stem}.safetensors", {names[name]: tensor.to(dtype) for name, tensor in tensors.items()})
    checkpoint = open_checkpoint(folder)
    for (part, tensors), dtype in zip(expected.items(), types.values(), strict=True):
        for name, tensor in tensors.items():
            found = np.asarray(checkpoint.weights[part].read(name), np.float32)
            np.testing.assert_array_equal(found, tensor.to(dtype).float().numpy())


@pytest.mark.parametrize("in_header", [False, True])
def test_format_1_says_what_it_is_beside_the_tensors_or_in_the_header(t2v, tmp_path, in_header):
    expected = format_1(tensors_of(t2v, "high_noise"), tmp_path / "x.safetensors", in_header=in_header)
    found = open_checkpoint(f"{t2v},high_noise={tmp_path / 'x.safetensors'}").weights["high_noise"]
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found.read(name), tensor.numpy())
