"""Static scales come in NVIDIA's layout, for each expert or for all, and only for the model they were measured on."""

import json

import numpy as np
import pytest

from export.checkpoint.checkpoint import open_checkpoint
from export.exporter import export_checkpoint
from export.files.safetensors_file import read_safetensors
from export.options import ExportOptions
from export.quantise.input_scales import LinearScales, check_weights, read_input_scales, write_input_scales
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS

# Entries of NVIDIA/TensorRT-Model-Connect, families/wan2_2_ti2v/data (Apache-2.0), unmodified.
NVIDIA = """{
  "blocks.0.ffn.net.0.proj": {
    "input_scale": 0.014808872767857143,
    "weight_scale": 0.000905532855540514
  },
  "blocks.0.ffn.net.2": {
    "input_scale": 0.026088169642857147,
    "weight_scale": 0.00048498915774481636
  }
}"""
TINY = SPECS["t2v-a14b-tiny"]


@pytest.fixture
def nvidia(tmp_path):
    (tmp_path / "scales.json").write_text(NVIDIA)
    return tmp_path / "scales.json"


def test_nvidias_file_is_read_as_it_stands(nvidia):
    scales = read_input_scales(nvidia, SPECS["ti2v-5b"])
    assert scales == {
        "dit": {
            "blocks.0.ffn.0": LinearScales(0.014808872767857143, 0.000905532855540514),
            "blocks.0.ffn.2": LinearScales(0.026088169642857147, 0.00048498915774481636),
        }
    }


def test_a_file_without_sections_applies_to_every_expert(nvidia):
    assert set(read_input_scales(nvidia, TINY)) == {"high_noise", "low_noise"}


@pytest.mark.parametrize("name", ["t2v-a14b-tiny", "ti2v-5b-tiny"])
def test_what_is_written_is_read_again(tmp_path, name):
    spec = SPECS[name]
    linears = {"blocks.0.self_attn.q": LinearScales(0.5, 0.1), "blocks.1.cross_attn.o": LinearScales(0.25, 0.2)}
    scales = dict.fromkeys(spec.experts, linears)
    write_input_scales(tmp_path / "s.json", scales, spec)
    assert read_input_scales(tmp_path / "s.json", spec) == scales
    content = json.loads((tmp_path / "s.json").read_text())
    flat = content if len(spec.experts) == 1 else content["low_noise"]
    assert flat["blocks.0.attn1.to_q"] == {"input_scale": 0.5, "weight_scale": 0.1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "has no scales"),
        ('{"high_noise": {}, "low_noise": {}}', "has no scales"),
        ("[]", "another layout"),
        ("[" * 100_000, "expected a JSON of input scales"),
        ('{"high_noise": {"a": {"input_scale": %s}}}' % ("9" * 400), "expected a JSON of input scales"),
    ],
    ids=["empty", "empty parts", "a list", "too deep", "400 digits"],
)
def test_a_file_without_scales_is_refused(tmp_path, content, told):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_input_scales(tmp_path / "s.json", TINY)


def test_means_in_place_of_scales_are_another_layout(tmp_path):
    (tmp_path / "means.safetensors").write_bytes(b"\xff\xfe\0\0")
    with pytest.raises(UserError, match=r"another layout \| expected a JSON of input scales"):
        read_input_scales(tmp_path / "means.safetensors", TINY)


def test_scales_of_other_weights_are_refused():
    scales = {"blocks.0.ffn.0": LinearScales(0.1, 0.5 / 448)}
    check_weights("s.json", scales, "dit", lambda _: np.array([0.1, -0.45]))
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0 up to 0\.5 .* 0\.2 like the checkpoint's dit"):
        check_weights("s.json", scales, "dit", lambda _: np.array([0.1, -0.2]))


def test_weights_may_be_stated_with_a_margin_that_is_the_same_for_all():
    scales = {f"blocks.{n}.ffn.0": LinearScales(0.1, 1.1 * (1 + n) / 448) for n in range(6)}
    check_weights("s.json", scales, "dit", lambda name: np.array([1.0 + int(name.split(".")[1])]))
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.0 up to 2\.2 .* 2\.06 like"):
        check_weights("s.json", scales, "dit", lambda name: np.array([1.0 + 1.06 * int(name.split(".")[1])]))


def test_an_export_refuses_scales_of_a_model_of_the_same_size(tmp_path, tiny_checkpoint):
    other = open_checkpoint(tiny_checkpoint).weights["low_noise"]
    stated = {
        n.removesuffix(".weight"): other.read(n) for n in other.names() if n.endswith(("ffn.0.weight", "o.weight"))
    }
    scales = {name: LinearScales(0.1, float(np.abs(weight).max()) / 448) for name, weight in stated.items()}
    write_input_scales(tmp_path / "s.json", {"high_noise": scales, "low_noise": scales}, TINY)
    with pytest.raises(UserError, match=r"like the checkpoint's high_noise"):
        options = ExportOptions(Precision.FP8, input_scales=tmp_path / "s.json")
        export_checkpoint(tiny_checkpoint, tmp_path / "b", options)


def test_an_export_refuses_the_file_of_another_model(tmp_path, tiny_checkpoint, nvidia):
    with pytest.raises(UserError, match="measured on this model"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", ExportOptions(Precision.FP8, input_scales=nvidia))
    assert not (tmp_path / "b").exists()


def test_each_expert_gets_its_own_scales(tmp_path, tiny_checkpoint):
    scales = {name: {"blocks.0.ffn.0": LinearScales(s)} for name, s in (("high_noise", 0.5), ("low_noise", 0.25))}
    write_input_scales(tmp_path / "s.json", scales, TINY)
    options = ExportOptions(Precision.FP8, input_scales=tmp_path / "s.json")
    export_checkpoint(tiny_checkpoint, tmp_path / "b", options)
    for name, scale in (("high_noise", 0.5), ("low_noise", 0.25)):
        assert read_safetensors(tmp_path / "b" / f"{name}.safetensors")["blocks.0.ffn.0.input_scale"].read() == scale
