"""The trained tiny model comes with the package: small, complete, and what ``synth`` writes for its name."""

import numpy as np
import pytest

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.schema import part_tensors
from export.files.safetensors_file import read_safetensors
from export.synth.checkpoint import synthesise
from export.synth.trained import SCALE, part_file, trained_folder, trained_pieces, trained_tokenizer
from wan22.specs import SPECS, spec_named

TOY = spec_named("t2v-a14b-toy")
PARTS = (*TOY.experts, "text_encoder", "vae")


def test_all_its_files_together_are_small():
    assert sum(path.stat().st_size for path in trained_folder(TOY).iterdir()) <= 12_000_000


def test_no_other_model_is_trained():
    assert [name for name, spec in SPECS.items() if trained_folder(spec)] == [TOY.name]
    assert trained_tokenizer(spec_named("t2v-a14b-tiny")) is None


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_is_there_under_its_official_name_and_finite(part):
    tensors = read_safetensors(part_file(trained_folder(TOY), part))
    shapes = {name: stored.shape for name, stored in tensors.items() if not name.endswith(SCALE)}
    assert shapes == part_tensors(part, TOY)
    assert all(np.isfinite(stored.read().astype(np.float32)).all() for stored in tensors.values())


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_checkpoint_of_that_name_has_these_weights(layout, tmp_path):
    synthesise(TOY, tmp_path / "checkpoint", layout, seed=3)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.spec == TOY
    assert (checkpoint.tokenizer / "spiece.model").read_bytes() == trained_tokenizer(TOY)
    for part in PARTS:
        for name in part_tensors(part, TOY):
            packed = np.concatenate(list(trained_pieces(trained_folder(TOY), part, name)))
            assert np.array_equal(checkpoint.weights[part].read(name).ravel(), packed.astype(np.float32)), name


def test_kernels_in_8_bits_are_multiplied_by_the_scale_of_their_row():
    folder, name = trained_folder(TOY), "decoder.conv1.weight"
    tensors = read_safetensors(part_file(folder, "vae"))
    kernel = np.concatenate(list(trained_pieces(folder, "vae", name))).reshape(part_tensors("vae", TOY)[name])
    row = tensors[name].read()[5].astype(np.float32) * np.float32(tensors[name + SCALE].read()[5])
    assert tensors[name].dtype == np.int8
    assert np.array_equal(kernel[5], row)
