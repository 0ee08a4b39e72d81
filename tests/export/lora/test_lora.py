"""LoRAs of every family merge exactly as PyTorch would; one that does not fit is refused, one misplaced is reported."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.keys import diffusers_names
from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK, dit_tensors
from export.lora.file import read_lora
from export.lora.merge import LoraChoice, merged, misplaced, open_lora, parse_lora
from export.synth.checkpoint import synthesise
from wan22.bundle import sha256_of
from wan22.errors import UserError
from wan22.specs import spec_named

SPEC = spec_named("t2v-a14b-tiny")
SHAPES = dit_tensors(SPEC.dit)
MODULES = [f"blocks.{layer}.{name}" for layer in range(SPEC.dit.layers) for name in DIT_LINEARS_PER_BLOCK]
RANK, ALPHA = 4, 1.5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "checkpoint"
    synthesise(SPEC, folder, "official", seed=1)
    return open_checkpoint(folder).weights


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 8


def pairs(rank=RANK, shapes=SHAPES):
    """Official module → down [rank, in], up [out, rank]."""
    linears = {module: shapes[f"{module}.weight"] for module in MODULES}
    seeds = enumerate(linears.items())
    return {m: (random(rank, i, seed=2 * n), random(o, rank, seed=2 * n + 1)) for n, (m, (o, i)) in seeds}


# The five families of wan22.md §8.1, each from the same pairs: what stands in the file, what its metadata say


def native(pairs, alpha=ALPHA, prefix="diffusion_model."):
    keys = {
        f"{prefix}{m}.lora_{half}.weight": t
        for m, p in pairs.items()
        for half, t in zip(("down", "up"), p, strict=True)
    }
    return keys | {f"{prefix}{m}.alpha": torch.tensor(alpha) for m in pairs}, None


def bare_native(pairs, alpha=ALPHA):
    return native(pairs, alpha, prefix="")


def ai_toolkit(pairs, alpha=ALPHA):
    keys = {
        f"diffusion_model.{m}.lora_{half}.weight": t for m, p in pairs.items() for half, t in zip("AB", p, strict=True)
    }
    return keys, None


def distilled(pairs, alpha=ALPHA):
    keys, _ = native(pairs, alpha)
    full = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.head.diff": "head.head.weight",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    return keys | {f"diffusion_model.{k}": random(*SHAPES[n], seed=len(k)) for k, n in full.items()}, None


def peft(pairs, alpha=ALPHA):
    names = diffusers_names("dit", SPEC)
    paths = {m: names[f"{m}.weight"].removesuffix(".weight") for m in pairs}
    keys = {
        f"transformer.{paths[m]}.lora_{h}.weight": t for m, p in pairs.items() for h, t in zip("AB", p, strict=True)
    }
    return keys, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha, "transformer.r": RANK})}


def musubi(pairs, alpha=ALPHA):
    keys, _ = native(pairs, alpha, prefix="")
    split = {key: key.index(".lora_") if ".lora_" in key else key.index(".alpha") for key in keys}
    return {f"lora_unet_{k[: split[k]].replace('.', '_')}{k[split[k] :]}": t for k, t in keys.items()}, None


FAMILIES = [native, bare_native, ai_toolkit, distilled, peft, musubi]


def saved(path, family, *arguments):
    keys, metadata = family(*arguments)
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: t.clone().contiguous() for k, t in keys.items()}, path, metadata)
    return path


def weight_of(base, name, expert="high_noise"):
    return torch.from_numpy(base[expert].read(name).copy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_the_merge_is_that_of_torch_bit_for_bit(tmp_path, base, family, strength):
    path = saved(tmp_path / "x.safetensors", family, pairs())
    weights = merged(base["high_noise"], [open_lora(LoraChoice(path, strength), SPEC)], "high_noise")
    scale = strength * (1.0 if family is ai_toolkit else ALPHA / RANK)
    for module, (down, up) in pairs().items():
        expected = weight_of(base, f"{module}.weight") + scale * (up @ down)
        np.testing.assert_array_equal(weights.read(f"{module}.weight"), expected.numpy())
    assert weights.names() == base["high_noise"].names()


def test_full_deltas_change_weights_biases_and_modulation(tmp_path, base):
    path = saved(tmp_path / "x.safetensors", distilled, pairs())
    weights = merged(base["high_noise"], [open_lora(LoraChoice(path, 0.5), SPEC)], "high_noise")
    keys, _ = distilled(pairs())
    changed = {
        "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.1.norm3.weight": "blocks.1.norm3.diff",
        "blocks.1.modulation": "blocks.1.diff_m",
        "head.head.weight": "head.head.diff",
        "patch_embedding.weight": "patch_embedding.diff",
    }
    for name, key in changed.items():
        expected = weight_of(base, name) + 0.5 * keys[f"diffusion_model.{key}"]
        np.testing.assert_array_equal(weights.read(name), expected.numpy())
    for name in ("blocks.0.modulation", "head.head.bias", "time_projection.1.weight"):
        np.testing.assert_array_equal(weights.read(name), base["high_noise"].read(name))


def test_a_convolution_is_merged_through_its_flat_form(tmp_path, base):
    down, up = random(RANK, 16, 1, 2, 2, seed=0), random(256, RANK, 1, 1, 1, seed=1)
    path = saved(tmp_path / "x.safetensors", lambda p: native(p, RANK), {"patch_embedding": (down, up)})
    name = "patch_embedding.weight"
    found = merged(base["high_noise"], [open_lora(LoraChoice(path), SPEC)], "high_noise").read(name)
    delta = torch.einsum("or,rctuv->octuv", up[:, :, 0, 0, 0], down)
    np.testing.assert_allclose(found, (weight_of(base, name) + delta).numpy(), atol=1e-6)


def test_the_bias_of_an_adapter_is_scaled_like_its_product(tmp_path, base):
    bias = random(256, seed=0)
    key = "transformer.blocks.0.attn1.to_q.lora_B.bias"

    def family(p):
        keys, metadata = peft(p)
        return keys | {key: bias}, metadata

    path = saved(tmp_path / "x.safetensors", family, pairs())
    found = merged(base["high_noise"], [open_lora(LoraChoice(path), SPEC)], "high_noise")
    expected = weight_of(base, "blocks.0.self_attn.q.bias") + ALPHA / RANK * bias
    np.testing.assert_array_equal(found.read("blocks.0.self_attn.q.bias"), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_multiplied_in_float32(tmp_path, base, dtype):
    half = {m: (down.to(dtype), up.to(dtype)) for m, (down, up) in pairs().items()}
    path = saved(tmp_path / "x.safetensors", ai_toolkit, half)
    weights = merged(base["high_noise"], [open_lora(LoraChoice(path), SPEC)], "high_noise")
    down, up = (t.float() for t in half[MODULES[3]])
    name = f"{MODULES[3]}.weight"
    np.testing.assert_array_equal(weights.read(name), (weight_of(base, name) + 1.0 * (up @ down)).numpy())


def scale_found(path, base, module=MODULES[0]):
    """What the product was multiplied with, from the merged weight."""
    weights = merged(base["high_noise"], [open_lora(LoraChoice(path), SPEC)], "high_noise")
    down, up = pairs()[module]
    change = torch.from_numpy(weights.read(f"{module}.weight")) - weight_of(base, f"{module}.weight")
    return float((change * (up @ down)).sum() / (up @ down).square().sum())


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({}, 1),
        ({"lora_alpha": 8, "r": 64}, 8 / RANK),  # the rank is that of the matrices
        ({"lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 2 / RANK),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}}, 8 / RANK),
    ],
)
def test_alpha_in_the_metadata(tmp_path, base, metadata, scale):
    content = json.dumps({f"transformer.{key}": value for key, value in metadata.items()})
    path = saved(tmp_path / "x.safetensors", lambda p: (peft(p)[0], {"lora_adapter_metadata": content}), pairs())
    assert scale_found(path, base) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize(("family", "alpha", "scale"), [(native, 8.0, 2), (musubi, 0.0, 1), (native, float(RANK), 1)])
def test_alpha_as_a_tensor(tmp_path, base, family, alpha, scale):
    path = saved(tmp_path / "x.safetensors", family, pairs(), alpha)
    assert scale_found(path, base) == pytest.approx(scale, rel=1e-4)


def test_an_expert_of_its_own(tmp_path, base):
    path = saved(tmp_path / "x.safetensors", native, pairs())
    lora = open_lora(parse_lora(f"{path}@0.5:low"), SPEC)
    assert merged(base["high_noise"], [lora], "high_noise") is base["high_noise"]
    name = f"{MODULES[0]}.weight"
    assert not np.array_equal(merged(base["low_noise"], [lora], "low_noise").read(name), base["low_noise"].read(name))
    record = lora.record()
    assert (record.file, record.strength, record.experts) == (str(path), 0.5, ("low_noise",))
    assert record.sha256 == sha256_of(path)


def test_several_loras_add_up(tmp_path, base):
    path = saved(tmp_path / "x.safetensors", native, pairs())
    loras = [open_lora(LoraChoice(path, strength), SPEC) for strength in (0.25, 0.75)]
    once = merged(base["high_noise"], [open_lora(LoraChoice(path), SPEC)], "high_noise")
    name = f"{MODULES[5]}.weight"
    np.testing.assert_allclose(merged(base["high_noise"], loras, "high_noise").read(name), once.read(name), atol=1e-6)


def test_merging_into_halves_gives_float32(tmp_path, base):
    """A bfloat16 checkpoint is not rounded again by the merge."""

    class Halved:
        names, shape = base["high_noise"].names, base["high_noise"].shape

        def dtype(self, name):
            return np.dtype(np.float16)

        def read(self, name):
            return base["high_noise"].read(name).astype(np.float16)

    path = saved(tmp_path / "x.safetensors", native, pairs())
    weights = merged(Halved(), [open_lora(LoraChoice(path), SPEC)], "high_noise")
    changed, untouched = f"{MODULES[0]}.weight", "head.head.weight"
    assert weights.dtype(changed) == weights.read(changed).dtype == np.float32
    assert weights.dtype(untouched) == weights.read(untouched).dtype == np.float16


@pytest.mark.parametrize("family", [native, peft, musubi])
def test_the_model_of_the_5b_has_one_expert(tmp_path, family):
    spec = spec_named("ti2v-5b-tiny")
    path = saved(tmp_path / "x.safetensors", family, pairs())
    assert open_lora(LoraChoice(path), spec).experts == ("dit",)
    with pytest.raises(UserError, match="has one"):
        open_lora(LoraChoice(path, expert="high"), spec)


# What the user writes


@pytest.mark.parametrize(
    ("argument", "choice"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("d/a.safetensors@0.8", ("d/a.safetensors", 0.8, None)),
        ("a@2.safetensors@-1:high", ("a@2.safetensors", -1.0, "high")),
        ("a.safetensors:low", ("a.safetensors", 1.0, "low")),
        ("a.pt@0.5", ("a.pt", 0.5, None)),
        ("d/adapter@-0.5:high", ("d/adapter", -0.5, "high")),
        ("a.safetensors:high_noise:0.8", ("a.safetensors", 0.8, "high")),
        ("d/adapter::2", ("d/adapter", 2.0, None)),
    ],
)
def test_the_argument(argument, choice):
    assert parse_lora(argument) == LoraChoice(Path(choice[0]), *choice[1:])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("a@b", "strength 'b'"),
        ("", "FILE"),
        ("a.safetensors@nan", "strength 'nan'"),
        ("a.safetensors@inf", "a number from -1000 to 1000"),
        ("a.safetensors@1e39", "a number from -1000 to 1000"),
        ("a.safetensors@", "strength ''"),
        ("a.safetensors@strong:high", "strength 'strong'"),
        ("a.safetensors:both", "expert 'both'"),
        ("a.safetensors:", "expert ''"),
        ("a.safetensors@1:low:2", "two strengths"),
    ],
)
def test_an_argument_that_says_nothing_sensible(argument, words):
    with pytest.raises(UserError, match=words):
        parse_lora(argument)


def test_a_strength_that_is_no_number_is_refused_from_python_too(tmp_path):
    with pytest.raises(UserError, match="strength nan"):
        open_lora(LoraChoice(saved(tmp_path / "x.safetensors", native, pairs()), math.nan), SPEC)


# What can be wrong with a file


def refused(path, words, **options):
    with pytest.raises(UserError, match=words) as error:
        open_lora(LoraChoice(path), SPEC, **options)
    assert "\n" not in str(error.value)


def test_keys_without_a_target_are_named_and_counted(tmp_path):
    extra = {f"diffusion_model.blocks.0.cross_attn.k_img.lora_{h}.weight": torch.ones(4, 4) for h in ("down", "up")}
    path = saved(tmp_path / "x.safetensors", lambda p: (native(p)[0] | extra, None), pairs())
    refused(path, r"2 keys without a weight in t2v-a14b-tiny: diffusion_model\.blocks\.0\.cross_attn\.k_img\.lora_down")
    lora = open_lora(LoraChoice(path), SPEC, ignore_unmatched=True)
    assert set(read_lora(path, SPEC).unmatched) == set(extra)
    assert len(lora.warnings) == 1
    assert "left out 2 keys" in lora.warnings[0]


def test_a_file_of_which_nothing_fits_is_refused_even_then(tmp_path):
    path = saved(tmp_path / "x.safetensors", lambda p: ({"lora_te_text_model.alpha": torch.tensor(1.0)}, None), {})
    refused(path, "1 keys without a weight", ignore_unmatched=True)


def test_a_lora_of_another_model_names_the_shape(tmp_path):
    wide = dit_tensors(replace(SPEC.dit, width=512))
    path = saved(tmp_path / "x.safetensors", native, pairs(shapes=wide))
    refused(path, r"attn\.\w has shape \[512, 4\]·\[4, 512\] \| expected \[256, 256\] of t2v-a14b-tiny")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k: {n: t for n, t in k.items() if "q.lora_up" not in n}, r"attn\.q has no lora_up"),
        (lambda k: k | {"blocks.0.ffn.0.diff_b": torch.ones(3)}, r"ffn\.0 has shape \[3\] \| expected \[512\]"),
        (lambda k: k | {"blocks.0.ffn.0.alpha": torch.ones(3)}, r"alpha of blocks\.0\.ffn\.0"),
        (lambda k: k | {"blocks.0.ffn.0.alpha": torch.tensor(math.nan)}, r"alpha of blocks\.0\.ffn\.0"),
        (lambda k: k | {"blocks.0.ffn.0.dora_scale": torch.ones(3)}, r"with magnitudes \[3\] \| expected \[512, 256\]"),
        (lambda k: k | {"blocks.0.ffn.0.hada_w1_a": torch.ones(4)}, "has hada_w1_a, lora_down, lora_up .* one kind"),
        (lambda k: k | {"blocks.0.ffn.0.oft_blocks": torch.ones(4)}, "oft_blocks makes it an OFT"),
        (lambda k: {"blocks.0.ffn.0.hada_w1_a": torch.ones(4)}, "has no hada_w1_b, hada_w2_a, hada_w2_b"),
        (lambda k: {"blocks.0.ffn.0.dora_scale": torch.ones(512)}, "a DoRA without its matrices"),
        (lambda k: k | {"blocks_0_ffn_0.alpha": torch.ones(1)}, r"a second alpha of blocks\.0\.ffn\.0"),
        (lambda k: {n: t.to(torch.int32) for n, t in k.items()}, "is int32"),
        (lambda k: k | {"blocks.0.ffn.0.lora_up.weight": torch.ones(512)}, r"has shape \[512\]·\[4, 256\]"),
        (lambda k: {}, "is empty"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path, change, words):
    path = saved(tmp_path / "x.safetensors", lambda p: (change(bare_native(p)[0]), None), pairs())
    refused(path, words)


@pytest.mark.parametrize("content", ["{", '{"transformer.lora_alpha": "much"}', "[]"])
def test_metadata_that_make_no_sense(tmp_path, content):
    path = saved(tmp_path / "x.safetensors", lambda p: (peft(p)[0], {"lora_adapter_metadata": content}), pairs())
    refused(path, "lora_adapter_metadata: ")


def test_a_dora_is_refused(tmp_path):
    content = json.dumps({"transformer.use_dora": True})
    path = saved(tmp_path / "x.safetensors", lambda p: (peft(p)[0], {"lora_adapter_metadata": content}), pairs())
    refused(path, "a DoRA")


def test_a_missing_or_corrupt_file(tmp_path):
    refused(tmp_path / "absent.safetensors", "absent.safetensors: No such file")
    path = saved(tmp_path / "x.safetensors", native, pairs())
    path.write_bytes(path.read_bytes()[:-7])
    refused(path, "bytes that its header declares")
    path.write_bytes(b"<html>404</html>")
    refused(path, "no safetensors header")


def test_a_lora_with_nan_is_named_when_it_is_merged(tmp_path, base):
    spoiled = pairs()
    spoiled[MODULES[0]][0][0, 0] = math.nan
    lora = open_lora(LoraChoice(saved(tmp_path / "x.safetensors", native, spoiled)), SPEC)
    with pytest.raises(UserError, match=r"x\.safetensors: NaN or infinity for blocks\.0\.self_attn\.q\.weight"):
        merged(base["high_noise"], [lora], "high_noise").read(f"{MODULES[0]}.weight")


# A LoRA for the other expert


@pytest.mark.parametrize(
    ("path", "experts", "warned"),
    [
        ("d/high_noise_model.safetensors", ["low_noise"], ["low"]),
        ("d/high_noise_model.safetensors", ["high_noise"], []),
        ("d/high_noise_model.safetensors", ["high_noise", "low_noise"], ["low"]),
        ("d/Wan22-LowNoise-v2.safetensors", ["high_noise"], ["high"]),
        ("d/style_HIGH.safetensors", ["low_noise"], ["low"]),
        ("low-noise/lora.safetensors", ["high_noise"], ["high"]),
        ("high_noise/low_noise.safetensors", ["low_noise"], []),
        ("d/high_low.safetensors", ["high_noise"], []),
        ("d/highlands.safetensors", ["low_noise"], []),
        ("d/low-rank_high-res.safetensors", ["high_noise"], []),
        ("d/glow.safetensors", ["high_noise"], []),
    ],
)
def test_a_name_that_speaks_for_the_other_expert_warns(path, experts, warned):
    warnings = misplaced(Path(path), experts)
    assert [w.rpartition("into the ")[2] for w in warnings] == [f"{expert}-noise expert" for expert in warned]


def test_the_warning_comes_with_the_lora(tmp_path):
    path = saved(tmp_path / "release/high_noise_model.safetensors", native, pairs())
    assert open_lora(parse_lora(f"{path}:high"), SPEC).warnings == ()
    assert "named high, merged into the low-noise expert" in open_lora(parse_lora(f"{path}:low"), SPEC).warnings[0]
