"""Checkpoints of single files: ComfyUI's, GGUF, mixtures with folders; the same tensors as the official folder has."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.describe import describe
from export.checkpoint.keys import diffusers_names, llama_names
from export.checkpoint.place import Place
from export.lora.inspection import as_lines, inspect_weights
from export.synth.checkpoint import synthesise
from runtime.tokenizer import Tokenizer
from tests.export.checkpoint.forms import all_in_one, comfy, fp8_by_row, fp8_scaled, save, tensors_of, write_gguf
from wan22.errors import UserError
from wan22.specs import spec_named

MODELS = ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"]
T2V = spec_named(MODELS[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name, layout)`` → a folder nobody may change."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name, layout="official"):
        if not (root / name / layout).exists():
            synthesise(spec_named(name), root / name / layout, layout, seed=5)
        return root / name / layout

    return folder


def same(found, expected, part, dtype=torch.float16):
    theirs = open_checkpoint(expected).weights[part]
    assert found.weights[part].names() == theirs.names()
    for name in theirs.names():
        rounded = torch.from_numpy(np.array(theirs.read(name), np.float32)).to(dtype).float().numpy()
        np.testing.assert_array_equal(np.array(found.weights[part].read(name), np.float32), rounded)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_comfyui(made, tmp_path, name):
    checkpoint = open_checkpoint(comfy(made(name), tmp_path / "models", name))
    assert checkpoint.spec == spec_named(name)
    assert checkpoint.source.layout == "files"
    for part in (*checkpoint.spec.experts, "text_encoder"):
        same(checkpoint, made(name), part)
    same(checkpoint, made(name), "vae", torch.bfloat16)
    own, official = Tokenizer(checkpoint.tokenizer), Tokenizer(made(name) / "google/umt5-xxl")
    for prompt in ("A red fox runs through fresh snow.", "一只猫在月光下弹钢琴", "ｆｕｌｌ-width & 4K"):
        np.testing.assert_array_equal(own.encode(prompt).ids, official.encode(prompt).ids)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_named_files_of_fp8_beside_a_folder(made, tmp_path, prefix):
    """Every part that is not named is the folder's."""
    written, expected = fp8_scaled(tensors_of(made(MODELS[0]), "high_noise"), prefix)
    path = save(tmp_path / "x.safetensors", written)
    for layout in ("official", "diffusers"):
        checkpoint = open_checkpoint(f"{made(MODELS[0], layout)},high_noise={path}")
        for name, tensor in expected.items():
            np.testing.assert_array_equal(checkpoint.weights["high_noise"].read(name), tensor.numpy())
        same(checkpoint, made(MODELS[0]), "low_noise", torch.float32)


@pytest.mark.parametrize("publisher", ["ComfyUI", "LightX2V"])
def test_a_text_encoder_in_fp8(made, tmp_path, publisher):
    """ComfyUI's under transformers' names with one scale; LightX2V's in a pickle with a scale for every row."""
    tensors = tensors_of(made(MODELS[0]), "text_encoder")
    if publisher == "ComfyUI":
        written, expected = fp8_scaled(tensors)
        stems = {name.removesuffix("weight"): theirs for name, theirs in diffusers_names("text_encoder", T2V).items()}
        theirs = {key: stems[key[: key.rindex(".") + 1]].removesuffix("weight") for key in written if "." in key}
        path = tmp_path / "umt5.safetensors"
        save(path, {theirs.get(key, "") + key.rpartition(".")[2]: tensor for key, tensor in written.items()})
    else:
        expected = fp8_by_row(tensors, tmp_path / "x.safetensors")
        path = tmp_path / "models_t5_umt5-xxl-enc-fp8.pth"
        torch.save(safetensors.torch.load_file(tmp_path / "x.safetensors"), path)
    found = open_checkpoint(f"{made(MODELS[0])},text_encoder={path}").weights["text_encoder"]
    for name, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(found.read(name), np.float32), tensor.numpy())


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_every_part_can_be_named(made, tmp_path, layout):
    folder = comfy(made(MODELS[0]), tmp_path / "comfy", "t2v")
    files = {
        "text_encoder": folder / "text_encoders/umt5_xxl_fp16.safetensors",
        "vae": folder / "vae/wan_vae.safetensors",
        "low_noise": folder / "diffusion_models/wan2.2_t2v_low_noise_fp16.safetensors",
    }
    checkpoint = open_checkpoint(str(Place(str(made(MODELS[0], layout)), files)))
    same(checkpoint, made(MODELS[0]), "text_encoder")
    same(checkpoint, made(MODELS[0]), "low_noise")
    same(checkpoint, made(MODELS[0]), "vae", torch.bfloat16)
    same(checkpoint, made(MODELS[0]), "high_noise", torch.float32)


def test_files_alone_are_a_checkpoint_that_can_be_named_again(made, tmp_path):
    folder = comfy(made(MODELS[0]), tmp_path / "comfy", "t2v")
    experts = {e: folder / f"diffusion_models/wan2.2_t2v_{e}_fp16.safetensors" for e in T2V.experts}
    files = experts | {"text_encoder": folder / "text_encoders/umt5_xxl_fp16.safetensors"}
    where = str(Place("", files | {"vae": folder / "vae/wan_vae.safetensors"}))
    checkpoint = open_checkpoint(where)
    assert checkpoint.spec == T2V
    again = open_checkpoint(checkpoint.source.checkpoint)
    assert again.source.fingerprint == checkpoint.source.fingerprint
    assert Place.parse(where) == Place("", {**files, "vae": folder / "vae/wan_vae.safetensors"})


def test_an_all_in_one_file_is_named_for_every_part(made, tmp_path):
    path = all_in_one(made(MODELS[2]), tmp_path / "aio.safetensors")
    checkpoint = open_checkpoint(f"dit={path},text_encoder={path},vae={path}")
    for part in ("dit", "text_encoder", "vae"):
        same(checkpoint, made(MODELS[2]), part)
    assert describe(path).form.startswith("ComfyUI all-in-one")


# GGUF


def test_gguf_of_transformer_and_text_encoder(made, tmp_path):
    experts = {"high_noise": "HighNoise", "low_noise": "LowNoise"}
    expected = {
        expert: write_gguf(tmp_path / word / f"Wan2.2-{word}-Q8_0.gguf", tensors_of(made(MODELS[0]), expert))
        for expert, word in experts.items()
    }
    text = tensors_of(made(MODELS[0]), "text_encoder")
    expected["text_encoder"] = write_gguf(tmp_path / "umt5.gguf", text, llama_names(T2V))
    vae = save(tmp_path / "VAE" / "Wan2.1_VAE.safetensors", tensors_of(made(MODELS[0]), "vae"))
    checkpoint = open_checkpoint(f"{tmp_path},tokenizer={made(MODELS[0]) / 'google/umt5-xxl'}")
    assert checkpoint.spec == T2V
    assert vae in checkpoint.files
    for part, tensors in expected.items():
        for name, value in tensors.items():
            np.testing.assert_array_equal(checkpoint.weights[part].read(name), value)
    with pytest.raises(UserError, match=r"umt5\.gguf holds no tokenizer .* --tokenizer DIR"):
        open_checkpoint(tmp_path)


def test_other_ggufs_are_named(made, tmp_path):
    tensors = tensors_of(made(MODELS[0]), "high_noise")
    write_gguf(tmp_path / "x.gguf", {k: t for k, t in tensors.items() if k != "patch_embedding.weight"})
    refused(f"{made(MODELS[0])},high_noise={tmp_path / 'x.gguf'}", "without the step that adds tensors of 5 dimensions")
    write_gguf(tmp_path / "y.gguf", {"token_embd.weight": torch.ones(4, 4)}, architecture="llama")
    refused(f"{made(MODELS[0])},high_noise={tmp_path / 'y.gguf'}", "a GGUF of architecture llama")


# Folders of releases that people have changed


@pytest.fixture
def copied(made, tmp_path):
    return lambda name, layout: shutil.copytree(made(name, layout), tmp_path / "copied")


def unsharded(folder, target, change=lambda tensors: tensors):
    tensors = {}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        tensors |= safetensors.torch.load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    return save(folder / target, change(tensors))


def test_the_only_file_of_an_experts_folder_is_the_expert(made, copied):
    folder = copied(MODELS[0], "official")
    unsharded(folder / "high_noise_model", "wan2.2_t2v_A14b_high_noise_lightx2v_4step.safetensors")
    same(open_checkpoint(folder), made(MODELS[0]), "high_noise", torch.float32)
    shutil.copy(folder / "Wan2.1_VAE.pth", folder / "high_noise_model" / "second.pth")
    with pytest.raises(UserError, match=r"holds 2 files of weights: second\.pth, wan2\.2"):
        open_checkpoint(folder)


def test_variants_are_read(made, copied):
    folder = copied(MODELS[0], "diffusers")
    unsharded(folder / "transformer", "diffusion_pytorch_model.bf16.safetensors")
    (folder / "text_encoder/model.safetensors.index.json").rename(
        folder / "text_encoder/model.safetensors.index.fp16.json"
    )
    for part in ("high_noise", "text_encoder"):
        same(open_checkpoint(folder), made(MODELS[0]), part, torch.float32)
    shutil.copy(
        folder / "transformer/diffusion_pytorch_model.bf16.safetensors",
        folder / "transformer/diffusion_pytorch_model.fp16.safetensors",
    )
    with pytest.raises(UserError, match="the variants bf16, fp16"):
        open_checkpoint(folder)


def test_shards_without_an_index_are_read_where_none_is_missing(made, copied):
    folder = copied(MODELS[0], "official")
    (folder / "high_noise_model/diffusion_pytorch_model.safetensors.index.json").unlink()
    same(open_checkpoint(folder), made(MODELS[0]), "high_noise", torch.float32)
    (folder / "high_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="shard 1 of diffusion_pytorch_model is missing"):
        open_checkpoint(folder)


def test_one_shard_is_refused_by_the_name_of_the_index_which_is_taken(made, copied):
    folder = copied(MODELS[0], "official")
    experts = {name: folder / f"{name}_model" for name in ("high_noise", "low_noise")}
    index = experts["low_noise"] / "diffusion_pytorch_model.safetensors.index.json"
    same(open_checkpoint(str(Place(str(folder), {"low_noise": index}))), made(MODELS[0]), "low_noise", torch.float32)
    shard = experts["low_noise"] / "diffusion_pytorch_model-00002-of-00002.safetensors"
    for place, remedy in (("low_noise", index), ("high_noise", shard.parent)):
        with pytest.raises(UserError) as error:
            open_checkpoint(str(Place(str(folder), {place: shard})))
        assert str(error.value) == f"{shard} is shard 2 of 2 | expected all shards of the part | name {remedy}"
        index.unlink(missing_ok=True)


def test_safetensors_in_place_of_pickles(made, copied):
    folder = copied(MODELS[0], "official")
    for stem in ("models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"):
        save(folder / f"{stem}.safetensors", torch.load(folder / f"{stem}.pth", weights_only=True))
        (folder / f"{stem}.pth").unlink()
    for part in ("text_encoder", "vae"):
        same(open_checkpoint(folder), made(MODELS[0]), part, torch.float32)


def test_of_two_vaes_the_one_for_the_transformer_is_read(made, copied):
    folder = copied(MODELS[2], "official")
    shutil.copy(made(MODELS[0]) / "Wan2.1_VAE.pth", folder)
    same(open_checkpoint(folder), made(MODELS[2]), "vae", torch.float32)


def test_wrapped_transformers_are_read(made, copied):
    folder = copied(MODELS[2], "official")
    path = unsharded(folder, "x.safetensors", lambda tensors: {f"_orig_mod.{k}": t for k, t in tensors.items()})
    same(open_checkpoint(folder), made(MODELS[2]), "dit", torch.float32)
    state = {k.removeprefix("_orig_mod."): t for k, t in safetensors.torch.load_file(path).items()}
    path.unlink()
    torch.save({"generator_ema": {f"model.{k}": t for k, t in state.items()}}, folder / "model.pt")
    same(open_checkpoint(folder), made(MODELS[2]), "dit", torch.float32)


def test_a_model_index_that_does_not_speak_of_timesteps(copied):
    folder = copied(MODELS[2], "diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    del index["expand_timesteps"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).spec == spec_named(MODELS[2])


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_slow_tokenizer_will_do(copied, layout):
    folder = copied(MODELS[0], layout)
    (vocabulary,) = folder.rglob("tokenizer.json")
    vocabulary.unlink()
    found = Tokenizer(open_checkpoint(folder).tokenizer).encode("A red fox runs.").ids
    assert found.ravel()[-1] == 1
    (vocabulary.parent / "spiece.model").write_bytes(b"\x0a\x03abc")
    with pytest.raises(UserError, match=r"spiece\.model: "):
        open_checkpoint(folder)


def test_the_cache_folder_of_the_hub(made, tmp_path):
    cache = tmp_path / "models--Wan-AI--Wan2.2-T2V-A14B"
    shutil.copytree(made(MODELS[0]), cache / "snapshots" / "abc")
    shutil.copytree(made(MODELS[1]), cache / "snapshots" / "def")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    assert open_checkpoint(cache).spec == T2V
    (cache / "refs/main").unlink()
    with pytest.raises(UserError, match="2 snapshots"):
        open_checkpoint(cache)


# What cannot be meant


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("vace_blocks.0.after_proj.weight", "Wan VACE, not supported"),
        ("control_adapter.conv.weight", "Fun Camera, not supported"),
        ("ref_conv.weight", "Fun Control, not supported"),
        ("casual_audio_encoder.weights", "S2V, not supported"),
        ("face_adapter.fuser.weight", "Animate, not supported"),
        ("blocks.0.self_attn.attn_op.local_attn.proj_l.weight", "sparse-linear attention"),
        ("img_emb.proj.0.weight", r"Wan2\.1 I2V"),
        ("blocks.0.self_attn.q.lora_A.weight", "a LoRA, not supported.* --lora"),
    ],
)
def test_other_models_are_named(made, tmp_path, key, words):
    tensors = tensors_of(made(MODELS[0]), "high_noise") | {key: torch.ones(4, 4)}
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=words):
        open_checkpoint(f"{made(MODELS[0])},high_noise={path}")


def refused(where, words):
    with pytest.raises(UserError, match=words) as error:
        open_checkpoint(where)
    assert "\n" not in str(error.value)


def test_files_that_make_no_model(made, tmp_path):
    folder = comfy(made(MODELS[0]), tmp_path / "comfy", "t2v")
    high = folder / "diffusion_models/wan2.2_t2v_high_noise_fp16.safetensors"
    text = folder / "text_encoders/umt5_xxl_fp16.safetensors"
    refused(f"high_noise={high}", r"no file for low noise, text encoder, vae .* --low-noise FILE --text-encoder FILE")
    refused(f"high_noise={high},dit={high},text_encoder={text},vae={high}", "--dit with an expert")
    refused(f"high_noise={high},high_noise={high}", "every part once")
    refused(f"{folder},vae={tmp_path / 'none.safetensors'}", "does not exist")
    refused(f"{folder},text_encoder={high}", r"text_encoder has no token_embedding\.weight")
    refused(f"{folder},vae={made(MODELS[2]) / 'Wan2.2_VAE.pth'}", "input and 16 output channels")
    refused(high, r"is a file: transformer of width 256.*high noise by its name.* --high-noise FILE")
    shutil.copy(high, high.with_name("second_high_noise.safetensors"))
    refused(folder, r"holds 2 files for high noise: second_high_noise\.safetensors, wan2\.2.* --high-noise FILE")
    text.unlink()
    high.unlink()
    refused(folder, "holds no text encoder .* --text-encoder FILE")


def test_stand_ins_for_files_are_named(copied):
    folder = copied(MODELS[0], "official")
    path = folder / "high_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n")
    refused(folder, "is a Git LFS pointer .* git lfs pull")
    path.write_text("<!DOCTYPE html><html>404</html>")
    refused(folder, "is a web page")


# wan-trt inspect


def test_inspection_of_files_folders_and_loras(made, tmp_path):
    folder = comfy(made(MODELS[0]), tmp_path / "comfy", "t2v")
    found = inspect_weights(folder)
    assert [entry["path"].rpartition("/")[2] for entry in found] == [
        "wan2.2_t2v_high_noise_fp16.safetensors",
        "wan2.2_t2v_low_noise_fp16.safetensors",
        "umt5_xxl_fp16.safetensors",
        "wan_vae.safetensors",
    ]
    assert found[0]["expert"] == "high noise, by its name"
    assert found[1]["export"].startswith("reads it with --low-noise ")
    assert (found[2]["is"], found[2]["tokenizer"]) == ("umt5 text encoder of width 128", "inside")
    assert found[3]["is"] == "Wan2.1 VAE"
    (official,) = inspect_weights(made(MODELS[0]))
    assert official["is"] == "t2v-a14b-tiny in the official layout"
    pair = {"blocks.0.ffn.0.lora_A.weight": torch.ones(4, 256), "blocks.0.ffn.0.lora_B.weight": torch.ones(512, 4)}
    (lora,) = inspect_weights(save(tmp_path / "style_HIGH.safetensors", pair))
    assert (lora["is"], lora["ranks"], lora["expert"]) == ("LoRA (1 LoRA)", {"4": 1}, "high")
    assert "  expert     high" in [*as_lines(lora)]
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        inspect_weights(tmp_path / "broken.safetensors")
    (broken,) = (entry for entry in inspect_weights(tmp_path) if "broken" in entry["path"])
    assert broken["export"] == "refuses it"
    with pytest.raises(UserError, match="does not exist"):
        inspect_weights(tmp_path / "none")
