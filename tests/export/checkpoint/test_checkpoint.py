"""Checkpoints of both layouts open alike; everything wrong with one is said in one line before any work."""

import json
import os
import shutil
from dataclasses import replace

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.schema import part_tensors
from export.synth.checkpoint import synthesise
from wan22.errors import UserError
from wan22.specs import T2V_A14B, TI2V_5B, spec_named

TINY = ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"]
LAYOUTS = ["official", "diffusers"]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name, layout)`` → a folder nobody may change."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name, layout):
        if not (root / name / layout).exists():
            synthesise(spec_named(name), root / name / layout, layout, seed=5)
        return root / name / layout

    return folder


@pytest.fixture
def copied(made, tmp_path):
    """``copied(name, layout)`` → a folder to spoil."""
    return lambda name, layout: shutil.copytree(made(name, layout), tmp_path / "spoiled")


@pytest.fixture
def official(copied):
    return copied(TINY[0], "official")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TINY)
def test_the_spec_is_recognised(made, name, layout):
    checkpoint = open_checkpoint(made(name, layout))
    assert checkpoint.spec == spec_named(name)
    assert checkpoint.source.layout == layout
    assert set(checkpoint.weights) == {*checkpoint.spec.experts, "text_encoder", "vae"}
    assert (checkpoint.tokenizer / "spiece.model").is_file()


@pytest.mark.parametrize("name", TINY)
def test_both_layouts_hold_the_same_tensors_under_official_names(made, name):
    official, diffusers = (open_checkpoint(made(name, layout)) for layout in LAYOUTS)
    for part, weights in official.weights.items():
        other = diffusers.weights[part]
        assert weights.names() == other.names() == list(part_tensors(part, official.spec))
        for tensor in weights.names():
            assert weights.shape(tensor) == weights.read(tensor).shape == part_tensors(part, official.spec)[tensor]
            assert weights.dtype(tensor) == weights.read(tensor).dtype
            np.testing.assert_array_equal(weights.read(tensor), other.read(tensor))


def test_values_and_types_are_those_of_the_files(made):
    folder = made(TINY[0], "official")
    weights = open_checkpoint(folder).weights
    text = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth")["norm.weight"]
    assert weights["text_encoder"].dtype("norm.weight") == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weights["text_encoder"].read("norm.weight").astype(np.float32), text.float().numpy())
    low = safetensors.torch.load_file(folder / "low_noise_model" / SHARD.format(2))["head.head.bias"]
    np.testing.assert_array_equal(weights["low_noise"].read("head.head.bias"), low.numpy())
    assert not np.array_equal(weights["high_noise"].read("head.head.bias"), low.numpy())


def test_a_full_size_checkpoint_opens_from_its_headers(tmp_path):
    synthesise(T2V_A14B, tmp_path / "full", "diffusers", seed=0, sparse=True)
    checkpoint = open_checkpoint(tmp_path / "full")
    assert checkpoint.spec == T2V_A14B
    assert checkpoint.weights["text_encoder"].shape("token_embedding.weight") == (256384, 4096)
    assert checkpoint.weights["low_noise"].read("blocks.39.ffn.2.bias").shape == (5120,)


def test_a_torch_file_over_two_gigabytes_opens_from_its_header(tmp_path):
    spec = replace(TI2V_5B, text_encoder=replace(TI2V_5B.text_encoder, layers=2))
    synthesise(spec, tmp_path / "full", "official", seed=0, sparse=True)
    weights = open_checkpoint(tmp_path / "full").weights
    assert weights["text_encoder"].read("norm.weight").shape == (4096,)
    assert weights["vae"].read("decoder.head.2.weight").shape == (12, 256, 3, 3, 3)


def test_the_fingerprint_follows_the_structure_not_the_place(made, copied):
    folder = made(TINY[0], "official")
    first = open_checkpoint(folder).source.fingerprint
    assert open_checkpoint(copied(TINY[0], "official")).source.fingerprint == first
    assert open_checkpoint(made(TINY[1], "official")).source.fingerprint != first


def test_the_fingerprint_tells_weights_of_the_same_structure_apart(made, copied):
    first, folder = open_checkpoint(made(TINY[0], "official")).source.fingerprint, copied(TINY[0], "official")
    with (folder / "high_noise_model" / SHARD.format(1)).open("r+b") as shard:
        shard.seek(shard.seek(0, os.SEEK_END) // 2)
        shard.write(bytes(16))
    assert open_checkpoint(folder).source.fingerprint != first


def test_one_unsharded_file_will_do(copied):
    folder = copied(TINY[0], "diffusers") / "transformer"
    tensors = {k: v for n in (1, 2) for k, v in safetensors.torch.load_file(folder / SHARD.format(n)).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    assert open_checkpoint(folder.parent).spec == spec_named(TINY[0])


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]])
def test_the_embedding_may_have_either_name_or_both(made, copied, names):
    folder = copied(TINY[0], "diffusers") / "text_encoder"
    rewrite(folder, "model-00001-of-00002.safetensors", lambda t: t | dict.fromkeys(names, t.pop("shared.weight")))
    found = open_checkpoint(folder.parent).weights["text_encoder"].read("token_embedding.weight")
    expected = open_checkpoint(made(TINY[0], "official")).weights["text_encoder"].read("token_embedding.weight")
    np.testing.assert_array_equal(found, expected)


def test_unknown_dimensions_make_a_custom_model(copied):
    folder = copied(TINY[2], "official")
    config(folder / "config.json", eps=1e-5)
    assert open_checkpoint(folder).spec.name == "ti2v-5b-custom"


# What can be wrong


def config(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite(folder, shard, change):
    """Changes the tensors of a shard and has the index agree."""
    tensors = safetensors.torch.load_file(folder / shard)
    tensors = {name: tensor.clone() for name, tensor in change(tensors).items()}
    safetensors.torch.save_file(tensors, folder / shard)
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != shard}
    path.write_text(json.dumps(index | {"weight_map": kept | dict.fromkeys(tensors, shard)}))


def refused(folder, words):
    with pytest.raises(UserError, match=words) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_folder(tmp_path):
    refused(tmp_path / "absent", "absent does not exist")
    refused(tmp_path, "neither model_index.json nor models_t5")
    (tmp_path / "x.safetensors").touch()
    refused(tmp_path / "x.safetensors", "is a file")


def test_an_expert_folder_is_no_checkpoint(official):
    refused(official / "high_noise_model", r"models_t5_umt5-xxl-enc-bf16\.pth is missing .* name its root folder")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("low_noise_model", r"low_noise_model has neither diffusion_pytorch_model\.safetensors\.index\.json"),
        (f"high_noise_model/{SHARD.format(2)}", "00002-of-00002.safetensors is missing"),
        ("high_noise_model/config.json", "config.json: No such file"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "enc-bf16.pth is missing"),
        ("Wan2.1_VAE.pth", "has no Wan2.1_VAE.pth or Wan2.2_VAE.pth"),
        ("google/umt5-xxl", "tokenizer.json is missing"),
    ],
)
def test_something_missing_in_the_official_layout(official, path, words):
    target = official / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    refused(official, words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("transformer_2", "transformer_2/config.json: No such file"),
        (f"transformer/{SHARD.format(1)}", "00001-of-00002.safetensors is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "vae has neither"),
        ("vae/config.json", "vae/config.json: No such file"),
        ("text_encoder/model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors is missing"),
        ("tokenizer", "tokenizer.json is missing"),
    ],
)
def test_something_missing_in_the_diffusers_layout(copied, path, words):
    target = copied(TINY[0], "diffusers") / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    refused(target.parents[len(path.split("/")) - 1], words)


@pytest.mark.parametrize(
    "path", [f"high_noise_model/{SHARD.format(2)}", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"]
)
def test_a_truncated_file(official, path):
    os.truncate(official / path, (official / path).stat().st_size - 1000)
    assert path in refused(official, "download")


def test_a_tokenizer_that_makes_its_library_panic(official, capfd):
    path = official / "google/umt5-xxl/tokenizer.json"
    text = path.read_text()
    at = text.index('"', text.index("precompiled_charsmap") + len('precompiled_charsmap"')) + 50
    path.write_text(text[:at] + "|" + text[at + 1 :])
    refused(official, r"tokenizer\.json: .*download that folder again")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("size_bytes", [0, 1000])
def test_a_truncated_tokenizer_is_found_before_any_work(official, size_bytes):
    os.truncate(official / "google/umt5-xxl/tokenizer.json", size_bytes)
    refused(official, r"tokenizer\.json: .* download that folder again")


def test_a_pickle_that_runs_code(official):
    class Code:
        def __reduce__(self):
            return os.system, ("touch /tmp/ran",)

    torch.save({"conv1.weight": Code()}, official / "Wan2.1_VAE.pth")
    refused(official, "Wan2.1_VAE.pth: .*tensors only, no code")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"patch_embedding.weight": SHARD.format(2)}, "does not hold patch_embedding.weight"),
        ({"more.weight": SHARD.format(1)}, "does not hold more.weight"),
        ({"more.weight": "other.safetensors"}, r"other\.safetensors is missing"),
        ({"more.weight": "../../other.safetensors"}, "names the file '../../other.safetensors'"),
    ],
)
def test_an_index_that_lies(official, weight_map, words):
    path = official / "high_noise_model" / INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | weight_map}))
    refused(official, words)


def test_an_index_that_names_a_tensor_twice(official):
    path = official / "high_noise_model" / INDEX
    again = f'"weight_map": {{"patch_embedding.weight": "{SHARD.format(2)}",'
    path.write_text(path.read_text().replace('"weight_map": {', again))
    refused(official, "names patch_embedding.weight twice")


def test_a_tensor_in_two_shards(official):
    rewrite(official / "low_noise_model", SHARD.format(2), lambda t: t | {"patch_embedding.bias": torch.ones(256)})
    refused(official, "patch_embedding.bias lies in .*00001-of.* and in .*00002-of")


def test_a_shard_of_another_type(official):
    rewrite(official / "low_noise_model", SHARD.format(2), lambda t: {k: v.bfloat16() for k, v in t.items()})
    refused(official, r"low_noise: blocks\.\d+.* is bfloat16 in .*00002-of.*, blocks\.0.* float32")


def test_an_index_or_config_that_is_no_json(official):
    (official / "low_noise_model/config.json").write_text("{'dim': 5}")
    refused(official, r"low_noise_model/config\.json: JSON is malformed")
    (official / "high_noise_model" / INDEX).write_bytes(b"\xff\xfe")
    refused(official, r"index\.json: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"a.b": torch.ones(1)}, r"low_noise: 1 unknown: a\.b \| expected the \d+ tensors of t2v"),
        (lambda t: {k: v for k, v in t.items() if k != "head.head.bias"}, r"low_noise: 1 missing: head\.head\.bias"),
        (lambda t: t | {"head.head.bias": torch.ones(63)}, r"head\.head\.bias has shape \[63\] \| expected \[64\]"),
        (lambda t: {f"model.diffusion_model.{k}": v for k, v in t.items()}, "a repack for ComfyUI"),
        (lambda t: t | {"head.head.scale_weight": torch.ones(1)}, r"head\.head\.scale_weight, a scaled FP8 repack"),
        (lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}, "is float8_e4m3fn"),
        (lambda t: {k: torch.full_like(v, 1, dtype=torch.int32) for k, v in t.items()}, "is int32"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models(official, change, words):
    rewrite(official / "low_noise_model", SHARD.format(2), change)
    refused(official, words)


def test_many_unknown_names_are_counted_and_three_shown(official):
    extra = {f"img_emb.proj.{n}.weight": torch.ones(1) for n in range(5)}
    rewrite(official / "low_noise_model", SHARD.format(2), lambda t: t | extra)
    refused(official, r"5 unknown: img_emb\.proj\.0\.weight, img_emb\.proj\.1\.weight, img_emb\.proj\.2\.weight, … \|")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": None}, "missing required field `dim`"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 3}, "3 heads for width 256"),
        ({"num_layers": 3}, r"27 missing: blocks\.2\."),
        ({"num_layers": 1}, r"27 unknown: blocks\.1\."),
        ({"dim": 512}, r"patch_embedding\.weight has shape \[256, 16, 1, 2, 2\] \| expected \[512, 16, 1, 2, 2\]"),
        ({"model_type": "i2v"}, "16 input and 16 output channels"),
        ({"model_type": "s2v"}, "model_type s2v"),
        ({"model_type": "ti2v"}, r"2 transformer\(s\) of type ti2v"),
        ({"text_len": 256}, "text_len 256"),
    ],
)
def test_a_config_that_does_not_fit(official, changes, words):
    for expert in ("high_noise_model", "low_noise_model"):
        config(official / expert / "config.json", **changes)
    refused(official, words)


def test_a_single_text_to_video_transformer_is_wan_2_1(copied):
    folder = copied(TINY[2], "official")
    config(folder / "config.json", model_type="t2v")
    refused(folder, r"1 transformer\(s\) of type t2v")


def test_experts_of_two_models(official):
    config(official / "low_noise_model/config.json", ffn_dim=1024)
    refused(official, "low_noise_model/config.json: ffn_dim 1024 .* 512 as in")


def test_the_text_encoder_of_another_model(official):
    torch.save({"shared.weight": torch.ones(4, 4)}, official / "models_t5_umt5-xxl-enc-bf16.pth")
    refused(official, r"text_encoder has no blocks\.0\.attn\.q\.weight \(but token_embedding\.weight")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_vae_of_another_model(made, copied, layout):
    folder = copied(TINY[0], layout)
    vae, other = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth") if layout == "official" else ("vae", "vae")
    source = made(TINY[2], layout) / other
    shutil.copyfile(source, folder / vae) if source.is_file() else shutil.copytree(
        source, folder / vae, dirs_exist_ok=True
    )
    refused(folder, "16 input and 16 output channels .* 48 and 48")


# The hub: its client is replaced, nothing else


def test_a_hub_name_is_downloaded(made, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(made(TINY[0], "official"))

    listed = [path.relative_to(made(TINY[0], "official")).as_posix() for path in made(TINY[0], "official").rglob("*")]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: listed)
    checkpoint = open_checkpoint("Wan-AI/Wan2.2-T2V-A14B")
    assert asked["name"] == checkpoint.source.checkpoint == "Wan-AI/Wan2.2-T2V-A14B"
    assert checkpoint.spec == spec_named(TINY[0])
    needed = [p.relative_to(checkpoint.folder).as_posix() for p in checkpoint.folder.rglob("*") if p.is_file()]
    filtered = huggingface_hub.utils.filter_repo_objects(
        [*needed, "assets/a.png"], allow_patterns=asked["allow_patterns"]
    )
    assert sorted(filtered) == sorted(needed)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["split_files/diffusion_models/a_high.safetensors", "split_files/vae/b.safetensors"], "2 single files: split"),
        (["HighNoise/a.gguf", "LowNoise/b.gguf"], "2 GGUF files: HighNoise/a.gguf, LowNoise/b.gguf"),
        (["README.md", "config.json"], "holds no weights"),
        (["a.safetensors"], "1 single files: a.safetensors"),
    ],
)
def test_a_repository_is_judged_by_its_list_of_files(monkeypatch, files, words):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("downloaded"))
    refused("Comfy-Org/Wan_2.2_ComfyUI_Repackaged", f"{words}.*--high-noise FILE")


def test_a_revision_is_asked_for_and_its_commit_recorded(made, monkeypatch, tmp_path):
    commit, asked = "c" * 40, []
    folder = shutil.copytree(made(TINY[0], "diffusers"), tmp_path / "snapshots" / commit)
    listed = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]

    def list_repo_files(self, name, revision):
        asked.append((name, revision))
        return listed

    def snapshot_download(name, *, revision, **options):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_checkpoint("Wan-AI/Wan2.2-T2V-A14B-Diffusers@v1").source
    assert asked == [("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "v1")] * 2
    assert (source.checkpoint, source.commit) == ("Wan-AI/Wan2.2-T2V-A14B-Diffusers@v1", commit)


def test_no_network_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("Wan-AI/Wan2.2-T2V-A14B", r"no folder Wan-AI/Wan2\.2-T2V-A14B here, and the hub: \w+Error")


@pytest.mark.parametrize("where", ["a/b/c", "./a", "a", "/a/b", "~/a", "a/.."])
def test_other_paths_never_reach_the_hub(monkeypatch, where):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    refused(where, "does not exist|neither")
