"""Every kind of LoRA gives the weights of its formula, computed here from the tensors that were written: in the export,
and in the reference of ``validate``, whose implementation is a separate one.
"""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.describe import named_expert
from export.checkpoint.keys import diffusers_names
from export.lora.merge import LoraChoice, merged, open_lora
from export.synth.checkpoint import synthesise
from validate.reference.loras import with_loras
from wan22.bundle import Manifest
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import spec_named

SPEC = spec_named("t2v-a14b-tiny")
Q, FFN, PATCHES = "blocks.0.self_attn.q", "blocks.1.ffn.0", "patch_embedding"
THEIRS = {name: theirs.removesuffix(".weight") for name, theirs in diffusers_names("dit", SPEC).items()}
SHAPES = {Q: (256, 256), FFN: (512, 256)}
RANK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialects") / "checkpoint"
    synthesise(SPEC, folder, "official", seed=1)
    return open_checkpoint(folder)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 8


def pair(module=FFN, rank=RANK):
    rows, columns = SHAPES[module]
    return random(rank, columns, seed=len(module)), random(rows, rank, seed=len(module) + 1)


def save(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def both(checkpoint, choice, expert, name):
    """The weight after the merge of the export and after that of the reference."""
    lora = open_lora(choice, SPEC)
    ours = merged(checkpoint.weights[expert], [lora], expert).read(name)
    manifest = Manifest("graphs", SPEC, Precision.FP32, (), (), checkpoint.source, "", loras=(lora.record(),))
    theirs = with_loras(checkpoint, manifest).weights[expert].read(name)
    return torch.from_numpy(np.array(ours, np.float32)), torch.from_numpy(np.array(theirs, np.float32))


def plain(checkpoint, name, expert="high_noise"):
    return torch.from_numpy(np.array(checkpoint.weights[expert].read(name), np.float32))


def check(checkpoint, choice, expected, name=f"{FFN}.weight", expert="high_noise"):
    assert not torch.allclose(expected, plain(checkpoint, name, expert))
    for found in both(checkpoint, choice, expert, name):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


SPELLINGS = {
    "bare A and B": ("diffusion_model.{m}.lora_A", "diffusion_model.{m}.lora_B"),
    "dots": ("diffusion_model.{m}.lora.down.weight", "diffusion_model.{m}.lora.up.weight"),
    "underscore": ("diffusion_model.{m}_lora.down.weight", "diffusion_model.{m}_lora.up.weight"),
    "linear layer": ("unet.{m}.lora_linear_layer.down.weight", "unet.{m}.lora_linear_layer.up.weight"),
    "DiffSynth": ("pipe.dit.{m}.lora_A.default.weight", "pipe.dit.{m}.lora_B.default.weight"),
    "model": ("model.{m}.lora_A.weight", "model.{m}.lora_B.weight"),
    "LyCORIS": ("lycoris_{u}.lora_down.weight", "lycoris_{u}.lora_up.weight"),
    "OneTrainer": ("lora_transformer_{u}.lora_down.weight", "lora_transformer_{u}.lora_up.weight"),
    "VideoX-Fun": ("lora_unet__{u}.lora_down.weight", "lora_unet__{u}.lora_up.weight"),
    "half converted": ("lora_unet_{h}.lora_down.weight", "lora_unet_{h}.lora_up.weight"),
    "Kohya over diffusers": ("lora_unet_{v}.lora_down.weight", "lora_unet_{v}.lora_up.weight"),
    "compiled": ("diffusion_model._orig_mod.{m}.lora_A.weight", "diffusion_model._orig_mod.{m}.lora_B.weight"),
    "peft": ("base_model.model.transformer.{d}.lora_A.weight", "base_model.model.transformer.{d}.lora_B.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(checkpoint, tmp_path, spelling):
    theirs = THEIRS[f"{FFN}.weight"]
    words = {"m": FFN, "u": FFN.replace(".", "_"), "h": FFN.replace(".", "_", 1), "d": theirs}
    down, up = (key.format(**words, v=theirs.replace(".", "_")) for key in SPELLINGS[spelling])
    matrices = pair()
    path = save(tmp_path / "x.safetensors", {down: matrices[0], up: matrices[1]})
    check(checkpoint, LoraChoice(path, 0.5), plain(checkpoint, f"{FFN}.weight") + 0.5 * matrices[1] @ matrices[0])


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(2), 0.5),
        (torch.tensor([2.0]).half(), 0.5),
        (torch.tensor(2.0, dtype=torch.float64), 0.5),
        (torch.tensor(2.0).to(torch.float8_e4m3fn), 0.5),
        (torch.tensor(0.0), 1.0),
        (None, 1.0),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_alphas_of_every_type(checkpoint, tmp_path, alpha, scale, suffix):
    down, up = pair()
    tensors = {f"diffusion_model.{FFN}.lora_down.weight": down, f"diffusion_model.{FFN}.lora_up.weight": up}
    tensors |= {} if alpha is None else {f"diffusion_model.{FFN}.alpha": alpha}
    path = save(tmp_path / f"x{suffix}", tensors)
    check(checkpoint, LoraChoice(path), plain(checkpoint, f"{FFN}.weight") + scale * up @ down)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_in_fp8_is_a_plain_cast(checkpoint, tmp_path, dtype):
    down, up = (tensor.to(dtype) for tensor in pair())
    path = save(tmp_path / "x.safetensors", {f"{FFN}.lora_A.weight": down, f"{FFN}.lora_B.weight": up})
    check(checkpoint, LoraChoice(path), plain(checkpoint, f"{FFN}.weight") + up.float() @ down.float())


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_loha(checkpoint, tmp_path, strength):
    a1, b1, a2, b2 = (random(*s, seed=n) for n, s in enumerate([(512, RANK), (RANK, 256)] * 2))
    key = f"lora_unet_{FFN.replace('.', '_')}"
    tensors = {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1, f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2}
    path = save(tmp_path / "x.safetensors", tensors | {f"{key}.alpha": torch.tensor(2.0)})
    expected = plain(checkpoint, f"{FFN}.weight") + strength * (2 / RANK) * (a1 @ b1) * (a2 @ b2)
    check(checkpoint, LoraChoice(path, strength), expected)


@pytest.mark.parametrize(
    ("first", "second", "scale"),
    [("", "", 1.0), ("", "factored", 3 / RANK), ("factored", "", 3 / 2), ("factored", "factored", 3 / RANK)],
)
def test_lokr_is_scaled_where_a_side_is_factored(checkpoint, tmp_path, first, second, scale):
    """Alpha of a LoKr without a rank means nothing: ai-toolkit writes 1e10 there."""
    sides, tensors = [], {}
    for number, factored, (rows, columns), rank in ((1, first, (8, 4), 2), (2, second, (64, 64), RANK)):
        key = f"diffusion_model.{FFN}.lokr_w{number}"
        if factored:
            left, right = random(rows, rank, seed=number), random(rank, columns, seed=number + 5)
            tensors |= {f"{key}_a": left, f"{key}_b": right}
            sides.append(left @ right)
        else:
            tensors[key] = random(rows, columns, seed=number)
            sides.append(tensors[key])
    alpha = torch.tensor(3.0 if first or second else 1e10)
    path = save(tmp_path / "x.safetensors", tensors | {f"diffusion_model.{FFN}.alpha": alpha})
    expected = plain(checkpoint, f"{FFN}.weight") + scale * torch.kron(*sides)
    check(checkpoint, LoraChoice(path), expected)


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [
        ("dora_scale", (512, 1)),
        ("magnitude", (512,)),
        ("lora_magnitude_vector.default.weight", (512,)),
        ("dora_scale", (1, 256)),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_sets_the_length_of_rows_or_columns(checkpoint, tmp_path, suffix, shape, strength):
    down, up = pair()
    base = plain(checkpoint, f"{FFN}.weight")
    rows = shape[0] == 512
    total = base + up @ down
    magnitude = total.norm(dim=int(rows)).reshape(shape) * (1 + 0.1 * random(*shape, seed=9))
    tensors = {f"{FFN}.lora_A.weight": down, f"{FFN}.lora_B.weight": up, f"{FFN}.{suffix}": magnitude}
    path = save(tmp_path / "x.safetensors", tensors)
    trained = total * magnitude.reshape((512, 1) if rows else (1, 256)) / total.norm(dim=int(rows), keepdim=True)
    check(checkpoint, LoraChoice(path, strength), base + strength * (trained - base))


def test_whole_tensors_take_the_place_of_the_checkpoints(checkpoint, tmp_path):
    down, up = pair()
    whole = random(256, 16, 1, 2, 2)
    tensors = {f"diffusion_model.{FFN}.lora_A.weight": down, f"diffusion_model.{FFN}.lora_B.weight": up}
    path = save(tmp_path / "x.safetensors", tensors | {f"diffusion_model.{PATCHES}.weight": whole})
    check(checkpoint, LoraChoice(path), whole, f"{PATCHES}.weight")
    path = save(tmp_path / "y.safetensors", tensors | {f"{PATCHES}.modules_to_save.default.weight": whole})
    check(checkpoint, LoraChoice(path), whole, f"{PATCHES}.weight")


@pytest.mark.parametrize("key", ["blocks.1.diff_m", "blocks.1.modulation.diff", "blocks.1.scale_shift_table.diff"])
def test_every_spelling_of_a_modulations_difference(checkpoint, tmp_path, key):
    change = random(1, 6, 256)
    path = save(tmp_path / "x.safetensors", {f"diffusion_model.{key}": change})
    name = "blocks.1.modulation"
    check(checkpoint, LoraChoice(path), plain(checkpoint, name) + change, name)


def test_patches_of_another_input_are_left_out_with_a_warning(checkpoint, tmp_path):
    down, up = pair()
    tensors = {f"{FFN}.lora_A.weight": down, f"{FFN}.lora_B.weight": up, f"{PATCHES}.diff": random(256, 36, 1, 2, 2)}
    path = save(tmp_path / "x.safetensors", tensors)
    (warning,) = open_lora(LoraChoice(path), SPEC).warnings
    assert f"left out {PATCHES}.weight [256, 36, 1, 2, 2], [256, 16, 1, 2, 2] in {SPEC.name}" in warning
    check(checkpoint, LoraChoice(path), plain(checkpoint, f"{FFN}.weight") + up @ down)
    for found in both(checkpoint, LoraChoice(path), "high_noise", f"{PATCHES}.weight"):
        assert torch.equal(found, plain(checkpoint, f"{PATCHES}.weight"))


def test_keys_of_a_text_encoder_are_named(tmp_path):
    down, up = pair()
    extra = {"text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": random(4, 4)}
    path = save(tmp_path / "x.safetensors", {f"{FFN}.lora_A.weight": down, f"{FFN}.lora_B.weight": up} | extra)
    with pytest.raises(UserError, match="it also changes a text encoder"):
        open_lora(LoraChoice(path), SPEC)


def test_a_folder_is_the_adapter_in_it(checkpoint, tmp_path):
    down, up = pair()
    tensors = {f"{FFN}.lora_A.weight": down, f"{FFN}.lora_B.weight": up}
    save(tmp_path / "adapter/adapter_model.safetensors", tensors)
    check(checkpoint, LoraChoice(tmp_path / "adapter"), plain(checkpoint, f"{FFN}.weight") + up @ down)
    with pytest.raises(UserError, match="no weights"):
        open_lora(LoraChoice(tmp_path), SPEC)
    for name in ("a", "b"):
        save(tmp_path / "two" / f"{name}.safetensors", tensors)
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors"):
        open_lora(LoraChoice(tmp_path / "two"), SPEC)


# The configuration of an adapter


def adapter(folder, config, name="adapter_model.safetensors", prefix="base_model.model."):
    tensors = {}
    for module in (Q, FFN):
        theirs = THEIRS[f"{module}.weight"]
        tensors |= dict(
            zip((f"{prefix}{theirs}.lora_A.weight", f"{prefix}{theirs}.lora_B.weight"), pair(module), strict=True)
        )
    path = save(folder / name, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "q", "ffn"),
    [
        ({"peft_type": "LORA", "r": RANK, "lora_alpha": 16}, 4, 4),
        ({"r": RANK, "lora_alpha": 16, "use_rslora": True}, 8, 8),
        ({"r": RANK, "lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 2}}, 0.5, 4),
        ({"r": RANK, "lora_alpha": 16, "alpha_pattern": {r"blocks\.[1-9]\..*": 2}}, 4, 0.5),
        ({"r": RANK, "lora_alpha": 16, "alpha_pattern": {r"^blocks\.0\.attn1\.to_q": 2, "to_q": 8}}, 0.5, 4),
        ({"r": RANK, "lora_alpha": 16, "alpha_pattern": {"o_q": 2}}, 4, 4),  # part of a name is no match
        ({"r": 2, "lora_alpha": 16, "rank_pattern": {"to_q": RANK}}, 4, 4),
        ({"r": RANK}, 1, 1),
    ],
)
def test_a_peft_configuration_beside_the_file_scales_it(checkpoint, tmp_path, config, q, ffn):
    path = adapter(tmp_path, config)
    for module, scale in ((Q, q), (FFN, ffn)):
        down, up = pair(module)
        name = f"{module}.weight"
        check(checkpoint, LoraChoice(path), plain(checkpoint, name) + scale * up @ down, name)


def test_a_configuration_of_other_weights_is_not_taken(checkpoint, tmp_path):
    path = adapter(tmp_path, {"r": RANK, "lora_alpha": 16}, "style.safetensors")
    down, up = pair()
    check(checkpoint, LoraChoice(path), plain(checkpoint, f"{FFN}.weight") + 4 * up @ down)
    save(tmp_path / "adapter_model.safetensors", {f"{Q}.lora_A.weight": pair(Q)[0]})
    (warning,) = open_lora(LoraChoice(path), SPEC).warnings
    assert "adapter_config.json next to it is not read" in warning
    check(checkpoint, LoraChoice(path), plain(checkpoint, f"{FFN}.weight") + up @ down)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "adapter_config.json: "),
        ('{"lora_alpha": "much"}', "adapter_config.json: .*lora_alpha"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', "adapter_config.json: "),
        ('{"peft_type": "OFT"}', "an adapter of type OFT"),
        ('{"use_dora": true}', "a DoRA without its magnitudes"),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path, text, words):
    path = adapter(tmp_path, {})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        open_lora(LoraChoice(path), SPEC)
    assert "\n" not in str(error.value)


def test_a_configuration_that_changed_is_named_by_validate(checkpoint, tmp_path):
    path = adapter(tmp_path, {"r": RANK, "lora_alpha": 16})
    record = open_lora(LoraChoice(path), SPEC).record()
    manifest = Manifest("graphs", SPEC, Precision.FP32, (), (), checkpoint.source, "", loras=(record,))
    with_loras(checkpoint, manifest)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    with pytest.raises(UserError, match=r"adapter_config\.json changed"):
        with_loras(checkpoint, manifest)


def test_a_finetrainers_file_is_scaled_as_it_was_trained(checkpoint, tmp_path):
    down, up = pair()
    tensors = {f"transformer.{FFN}.lora_A.weight": down, f"transformer.{FFN}.lora_B.weight": up}
    path = save(tmp_path / "x.safetensors", tensors, {"lora_config": json.dumps({"r": RANK, "lora_alpha": 8})})
    check(checkpoint, LoraChoice(path), plain(checkpoint, f"{FFN}.weight") + 2 * up @ down)
    assert "scaled as trained" in open_lora(LoraChoice(path), SPEC).warnings[0]


# Which expert


def split_file(path, first, second):
    tensors = {}
    for prefix, (down, up) in ((first, pair()), (second, (pair()[0], 2 * pair()[1]))):
        tensors |= {f"{prefix}.{FFN}.lora_A.weight": down, f"{prefix}.{FFN}.lora_B.weight": up}
    return save(path, tensors)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer", "transformer_2"),
        ("diffusion_model.transformer_1", "diffusion_model.transformer_2"),
    ],
)
def test_a_file_for_both_experts_is_split(checkpoint, tmp_path, first, second):
    path = split_file(tmp_path / "x_high.safetensors", first, second)
    lora = open_lora(LoraChoice(path), SPEC)
    assert sorted(lora.experts) == ["high_noise", "low_noise"]
    down, up = pair()
    for expert, factor in (("high_noise", 1), ("low_noise", 2)):
        expected = plain(checkpoint, f"{FFN}.weight", expert) + factor * up @ down
        check(checkpoint, LoraChoice(path), expected, expert=expert)
    assert open_lora(LoraChoice(path, expert="low"), SPEC).experts == ("low_noise",)


def test_metadata_scale_each_transformer(checkpoint, tmp_path):
    path = split_file(tmp_path / "x.safetensors", "transformer", "transformer_2")
    config = {"transformer.lora_alpha": 2 * RANK, "transformer_2.lora_alpha": 4 * RANK}
    save(path, safetensors.torch.load_file(path), {"lora_adapter_metadata": json.dumps(config)})
    down, up = pair()
    for expert, factor in (("high_noise", 2), ("low_noise", 2 * 4)):
        expected = plain(checkpoint, f"{FFN}.weight", expert) + factor * up @ down
        check(checkpoint, LoraChoice(path), expected, expert=expert)


def test_a_file_for_one_expert_of_two_names_it(tmp_path):
    down, up = pair()
    keys = (f"transformer_2.{FFN}.lora_A.weight", f"transformer_2.{FFN}.lora_B.weight")
    path = save(tmp_path / "x.safetensors", dict(zip(keys, (down, up), strict=True)))
    assert open_lora(LoraChoice(path), SPEC).experts == ("low_noise",)
    with pytest.raises(UserError, match="its keys are for the low-noise expert"):
        open_lora(LoraChoice(path, expert="high"), SPEC)
    with pytest.raises(UserError, match="which has one transformer"):
        open_lora(LoraChoice(path), spec_named("ti2v-5b-tiny"))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16", "high"),
        ("Wan2.2_I2V_A14B_HIGH_lightx2v_MoE_distill_lora_rank_64_bf16", "high"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise", "low"),
        ("Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_LOW_fp16", "low"),
        ("Wan2.2-T2V-A14B-HighNoise-lora", "high"),
        ("style-H-e8", "high"),
        ("style_LN_v2", "low"),
        ("HD_style", None),
        ("highlight_lora", None),
        ("low-light_style", None),
        ("high_low", None),
    ],
)
def test_the_names_that_people_publish(name, expert):
    assert named_expert(name) == expert


def test_a_name_or_the_metadata_choose_the_expert_and_say_so(tmp_path):
    down, up = pair()
    tensors = {f"{FFN}.lora_A.weight": down, f"{FFN}.lora_B.weight": up}
    lora = open_lora(LoraChoice(save(tmp_path / "style_HIGH_Lightning.safetensors", tensors)), SPEC)
    assert lora.experts == ("high_noise",)
    assert "named high, merged into the high-noise expert alone; add it with :low" in lora.warnings[0]
    path = save(tmp_path / "style.safetensors", tensors, {"model_type": "Wan22-T2V-A14B-low"})
    assert open_lora(LoraChoice(path), SPEC).experts == ("low_noise",)
    assert "named low, merged into the high-noise" in open_lora(LoraChoice(path, expert="high"), SPEC).warnings[0]


def test_the_two_merges_do_not_share_a_fault(checkpoint, tmp_path, monkeypatch):
    """With the export's scale broken, the reference still has the right one."""
    monkeypatch.setattr("export.lora.file._scale", lambda *_: math.pi)
    path = adapter(tmp_path, {"r": RANK, "lora_alpha": 16})
    ours, theirs = both(checkpoint, LoraChoice(path), "high_noise", f"{FFN}.weight")
    down, up = pair()
    torch.testing.assert_close(theirs, plain(checkpoint, f"{FFN}.weight") + 4 * up @ down)
    assert not torch.allclose(ours, theirs)
