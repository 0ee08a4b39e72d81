"""Synthetic checkpoints look like the published ones, load in diffusers and transformers, and do real work there."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors
import torch

from export.files.safetensors_file import read_safetensors
from export.files.torch_reader import read_torch
from export.synth.checkpoint import synthesise, weights_bytes
from wan22.errors import UserError
from wan22.sampling import NEGATIVE_PROMPT
from wan22.specs import spec_named

TINY = ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"]
PROMPT = "A red fox runs through fresh snow in a quiet forest"


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    """The spec of a tiny model and its checkpoint in the -Diffusers layout."""
    folder = tmp_path_factory.mktemp("synth") / request.param
    synthesise(spec_named(request.param), folder, "diffusers", seed=0)
    return spec_named(request.param), folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def shards(folder, stem="diffusion_pytorch_model"):
    prefix = f"{folder}/" if folder else ""
    parts = [f"{prefix}{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    return [*parts, f"{prefix}{stem}.safetensors.index.json"]


def tokenizer(folder):
    names = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
    return [f"{folder}/{name}" for name in names]


def test_official_files_of_the_a14b(tmp_path):
    synthesise(spec_named(TINY[0]), tmp_path / "c", "official", seed=0)
    experts = [f for e in ("high_noise_model", "low_noise_model") for f in (f"{e}/config.json", *shards(e))]
    rest = ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", *tokenizer("google/umt5-xxl")]
    assert files(tmp_path / "c") == sorted([*experts, *rest])
    assert json.loads((tmp_path / "c/low_noise_model/config.json").read_text()) == {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "model_type": "t2v", "dim": 256, "ffn_dim": 512,
        "freq_dim": 256, "in_dim": 16, "out_dim": 16, "num_heads": 2, "num_layers": 2, "text_len": 512, "eps": 1e-6,
    }  # fmt: skip


def test_official_files_of_the_5b_lie_in_the_root(tmp_path):
    synthesise(spec_named(TINY[2]), tmp_path / "c", "official", seed=0)
    rest = ["config.json", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.2_VAE.pth", *tokenizer("google/umt5-xxl")]
    assert files(tmp_path / "c") == sorted([*shards(""), *rest])


def test_stored_types(tmp_path):
    synthesise(spec_named(TINY[0]), tmp_path / "c", "official", seed=0)

    def types(tensors):
        return {str(stored.dtype) for stored in tensors.values()}

    assert types(read_torch(tmp_path / "c/models_t5_umt5-xxl-enc-bf16.pth")) == {"bfloat16"}
    assert types(read_torch(tmp_path / "c/Wan2.1_VAE.pth")) == {"float32"}
    assert types(read_safetensors(tmp_path / "c" / shards("high_noise_model")[0])) == {"float32"}
    synthesise(spec_named(TINY[0]), tmp_path / "d", "diffusers", seed=0)
    assert types(read_safetensors(tmp_path / "d" / shards("text_encoder", "model")[1])) == {"bfloat16"}


def test_the_index_names_the_shard_of_every_tensor(tiny):
    folder = tiny[1] / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as shard:
            assert {index["weight_map"][name] for name in shard.keys()} == {path.name}  # noqa: SIM118
            index["metadata"]["total_size"] -= sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == 0


def fingerprint(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder)}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_the_seed_decides_every_byte(tmp_path, layout):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthesise(spec_named(TINY[0]), tmp_path / folder, layout, seed)
    first, same, other = (fingerprint(tmp_path / folder) for folder in "abc")
    assert first == same
    weights = [name for name in first if name.endswith((".safetensors", ".pth"))]
    assert all(first[name] != other[name] for name in weights)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/file").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        synthesise(spec_named(TINY[0]), tmp_path / "c", "official", seed=0)
    assert files(tmp_path) == ["c/file"]


def test_a_disk_too_small_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**28))
    synthesise(spec_named(TINY[0]), tmp_path / "tiny", "official", seed=0)
    synthesise(spec_named("t2v-a14b-small"), tmp_path / "sparse", "official", seed=0, sparse=True)
    with pytest.raises(UserError, match=r"256.0 MiB free at .* expected 117\.\d GiB for c"):
        synthesise(spec_named("t2v-a14b"), tmp_path / "c", "official", seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse", "tiny"]


@pytest.mark.parametrize("half", [False, True])
def test_the_space_asked_for_is_that_of_the_weights(tmp_path, half):
    spec = spec_named("t2v-a14b-small")
    synthesise(spec, tmp_path / "c", "diffusers", seed=0, half=half, sparse=True)
    stored = sum((tmp_path / "c" / name).stat().st_size for name in files(tmp_path / "c"))
    assert 0 < stored - weights_bytes(spec, half=half) < 10 * 2**20


def test_a_killed_run_leaves_nothing(tmp_path):
    def interrupt(task, done, total, unit=""):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(spec_named(TINY[0]), tmp_path / "c", "official", seed=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_tensor(tmp_path):
    seen = []
    synthesise(spec_named(TINY[0]), tmp_path / "c", "diffusers", 0, progress=lambda *a, unit="": seen.append(a[1:3]))
    assert seen == [(k + 1, seen[0][1]) for k in range(seen[0][1])]


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_sparse_files_have_the_true_size_and_take_no_space(tmp_path, layout):
    spec = spec_named("t2v-a14b-small")
    synthesise(spec, tmp_path / "c", layout, seed=0, sparse=True)
    statuses = [(tmp_path / "c" / name).stat() for name in files(tmp_path / "c")]
    assert sum(status.st_size for status in statuses) > 500 * 2**20
    assert sum(status.st_blocks * 512 for status in statuses) < 10 * 2**20


def test_the_pipeline_of_diffusers_loads_and_runs_it(tiny):
    import diffusers

    spec, folder = tiny
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    assert pipeline.config.expand_timesteps == (spec.task == "ti2v")
    assert pipeline.config.boundary_ratio == spec.sampling.boundary
    assert (pipeline.transformer_2 is None) == (len(spec.experts) == 1)
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": torch.zeros(1, 3, 64, 64)} if spec.task == "i2v" else {}
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2}
    frames = pipeline(prompt=PROMPT, output_type="np", **size, **image).frames
    assert frames.shape == (1, 5, 64, 64, 3)
    assert 0.03 < frames.std() < 0.5


def text_embeddings(folder, prompt):
    """``[1, 512, D]`` with zeros after the prompt, and the rows of the prompt alone."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")(prompt, return_tensors="pt").input_ids
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    rows = encoder(tokens).last_hidden_state
    return torch.nn.functional.pad(rows, (0, 0, 0, 512 - rows.shape[1])), rows[0]


@torch.no_grad()
def test_text_embeddings_are_of_order_a_third_and_differ_by_token(tiny):
    _, rows = text_embeddings(tiny[1], PROMPT)
    assert 0.2 < rows.std() < 0.5
    assert (rows[1:] - rows[:-1]).norm() / rows.norm() > 0.5


@torch.no_grad()
def test_velocities_are_of_order_one_and_depend_on_everything(tiny):
    import diffusers

    spec, folder = tiny
    text, other_text = text_embeddings(folder, PROMPT)[0], text_embeddings(folder, NEGATIVE_PROMPT)[0]
    latents = torch.randn(1, spec.dit.in_channels, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = ["transformer", "transformer_2"][: len(spec.experts)]
    models = [diffusers.WanTransformer3DModel.from_pretrained(folder / part) for part in parts]

    def velocity(model, t, text):
        return model(latents, torch.tensor([t]), text, return_dict=False)[0]

    def change(new, old):
        return float((new - old).norm() / old.norm())

    for model in models:
        base = velocity(model, 875.0, text)
        assert 0.7 < base.std() < 1.4
        assert change(velocity(model, 500.0, text), base) > 0.3
        assert change(velocity(model, 875.0, other_text), base) > 0.02
    if len(models) > 1:
        assert change(*(velocity(model, 875.0, text) for model in models)) > 0.5


@torch.no_grad()
def test_frames_fill_the_range_without_clipping_much(tiny):
    import diffusers

    spec, folder = tiny
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (spec.vae.latents_mean, spec.vae.latents_std))
    noise = torch.randn(1, spec.vae.latent_channels, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = vae.decode(noise * std + mean, return_dict=False)[0]
    assert 0.2 < frames.std() < 0.5
    assert (frames.abs() >= 1).float().mean() < 0.05
    video = torch.nn.functional.interpolate(noise[:, :3], size=(5, 64, 64), mode="trilinear").clamp(-1, 1)
    latents = (vae.encode(video).latent_dist.mode() - mean) / std
    assert 0.5 < latents.std() < 1.5


def test_no_tensor_is_constant_or_wild(tiny):
    for path in tiny[1].rglob("*.safetensors"):
        for name, stored in read_safetensors(path).items():
            values = stored.read().astype(np.float32)
            assert 0 < values.std() < 1.3, name
            assert np.abs(values).max() < 8, name
