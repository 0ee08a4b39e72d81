"""The trained tiny model comes with the package: small, complete, and what ``synth`` writes for its name."""

import numpy as np
import pytest

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.schema import part_tensors
from export.files.safetensors_file import read_safetensors
from export.synth.checkpoint import synthesise
from export.synth.trained import part_file, trained_folder, trained_tokenizer
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
    assert {name: stored.shape for name, stored in tensors.items()} == part_tensors(part, TOY)
    assert all(np.isfinite(stored.read().astype(np.float32)).all() for stored in tensors.values())


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_checkpoint_of_that_name_has_these_weights(layout, tmp_path):
    synthesise(TOY, tmp_path / "checkpoint", layout, seed=3)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.spec == TOY
    assert (checkpoint.tokenizer / "spiece.model").read_bytes() == trained_tokenizer(TOY)
    for part in PARTS:
        packed = read_safetensors(part_file(trained_folder(TOY), part))
        for name, stored in checkpoint.weights[part].items():
            assert np.array_equal(stored.read().astype(np.float32), packed[name].read().astype(np.float32)), name
