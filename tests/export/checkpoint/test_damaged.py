"""Checkpoints of every layout with one file cut off or with wrong bytes: read, or refused in one line.

``WAN_TRT_FUZZED`` sets the number of damaged files of each layout.
"""

import os
import random
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.keys import llama_names
from export.lora.inspection import inspect_weights
from export.synth.checkpoint import synthesise
from export.synth.tokenizer import trained_model
from tests.export.checkpoint.forms import comfy, fp8_by_row, fp8_scaled, save, tensors_of, write_gguf
from tests.test_fuzzed import ROUNDS, damaged
from wan22.errors import UserError
from wan22.specs import spec_named

T2V = spec_named("t2v-a14b-tiny")
LAYOUTS = ("official", "diffusers", "comfy", "fp8_scaled", "gguf", "distilled")
GROWTH_MAX_BYTES = 2**30


def written(layout, folder, base):
    """A checkpoint of ``layout``; ``base`` is an official one of the same model."""
    if layout in ("official", "diffusers"):
        synthesise(T2V, folder, layout, seed=13)
    elif layout == "comfy":
        comfy(base, folder, "t2v")
    elif layout == "fp8_scaled":
        comfy(base, folder, "t2v")
        for expert in T2V.experts:
            path = folder / "diffusion_models" / f"wan2.2_t2v_{expert}_fp16.safetensors"
            save(path, fp8_scaled(tensors_of(base, expert), "model.diffusion_model.")[0])
    elif layout == "gguf":
        for expert in T2V.experts:
            write_gguf(folder / f"{expert}.gguf", tensors_of(base, expert))
        text = tensors_of(base, "text_encoder")
        write_gguf(folder / "umt5.gguf", text, llama_names(T2V), "t5encoder", trained_model())
        save(folder / "vae.safetensors", tensors_of(base, "vae"))
    else:
        shutil.copytree(base, folder)
        for path in (folder / "high_noise_model").glob("diffusion_pytorch_model*"):
            path.unlink()
        fp8_by_row(tensors_of(base, "high_noise"), folder / "high_noise_model" / "distilled.safetensors")
        torch.save({"state_dict": tensors_of(base, "vae")}, folder / "Wan2.1_VAE.pth")
    return folder


def read(folder):
    """Open the checkpoint and read a few of its tensors; False if it is refused."""
    try:
        checkpoint = open_checkpoint(folder)
        for weights in checkpoint.weights.values():
            for name in weights.names()[::9]:
                weights.read(name)
                weights.codes(name)
        return True
    except UserError as error:
        assert "\n" not in str(error)
        return False


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("layouts"), {}
    base = written("official", root / "base", None)

    def folder(layout):
        found[layout] = found.get(layout) or written(layout, root / layout, base)
        return found[layout]

    return folder


def linked(source, target):
    """A copy of a folder that shares its files; a file to damage is replaced, not written to."""
    return shutil.copytree(source, target, copy_function=os.link)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNREAD)


UNREAD = ("README.md", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "scheduler_config.json")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_file_may_be_cut_off(layout, made, tmp_path):
    folder = linked(made(layout), tmp_path / "cut")
    for path in files_of(folder):
        content = path.read_bytes()
        for size in {0, 1, 7, 8, 40, len(content) // 2, len(content) - 1}:
            path.unlink()
            path.write_bytes(content[:size])
            assert not read(folder) or content[size:].isspace(), f"{path} of {size} bytes was read"
        path.unlink()
        path.write_bytes(content)
    assert read(folder)


def fuzz(folder, rounds, seed):
    """Damages one file of ``folder`` in every round; returns how often the checkpoint was still read."""
    chance, kept = random.Random(seed), 0
    paths = files_of(folder)
    small = [path for path in paths if path.suffix in (".json", ".model")]
    for _ in range(rounds):
        path = chance.choice(small if small and chance.random() < 0.3 else paths)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(damaged(content, chance))
        try:
            kept += read(folder)
            if path.suffix in (".safetensors", ".gguf", ".pth"):
                inspect_weights(path)
        except UserError as error:
            assert "\n" not in str(error)
        except BaseException:
            shutil.copy(path, Path(tempfile.gettempdir()) / f"damaged-{path.name}")
            raise
        path.unlink()
        path.write_bytes(content)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files_of_a_checkpoint(layout, made, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = fuzz(linked(made(layout), tmp_path / "damaged"), ROUNDS, LAYOUTS.index(layout))
    assert kept < ROUNDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH_MAX_BYTES
