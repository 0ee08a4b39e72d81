"""The PyTorch side loads either layout, and loads it completely or fails."""

import dataclasses

import numpy as np
import pytest
import torch

from export.checkpoint.checkpoint import open_checkpoint
from export.synth.checkpoint import synthesise
from validate.reference.parts import sinusoid, time_features
from validate.reference.reference import Reference
from wan22.specs import SPECS, TEXT_TOKENS

SPEC = SPECS["t2v-a14b-tiny"]
RANDOM = np.random.default_rng(0)
LATENTS = RANDOM.standard_normal(SPEC.latent_shape(32, 32, 5), np.float32)
TEXT = RANDOM.standard_normal((1, TEXT_TOKENS, SPEC.dit.text_width), np.float32)
PROMPT = "A fox &amp;amp;  a hen,\n一只狐狸"


@pytest.fixture(scope="module")
def official(tiny_checkpoint):
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "diffusers"
    synthesise(SPEC, folder, "diffusers", seed=0)  # the weights of ``tiny_checkpoint``
    return open_checkpoint(folder)


def test_both_layouts_give_the_same_reference(official, diffusers):
    one, other = Reference(official), Reference(diffusers)
    ids = one.token_ids(PROMPT)
    assert np.array_equal(ids, other.token_ids(PROMPT))
    assert np.array_equal(one.embeddings(ids), other.embeddings(ids))
    assert np.array_equal(one.decode(LATENTS), other.decode(LATENTS))
    velocities = {}
    for expert in SPEC.experts:
        velocities[expert] = one.velocity(expert, LATENTS, 900.0, TEXT)
        assert np.array_equal(velocities[expert], other.velocity(expert, LATENTS, 900.0, TEXT))
    assert not np.allclose(velocities["high_noise"], velocities["low_noise"], atol=0.1)


def test_prompts_are_cleaned_and_end_with_the_end_mark(official):
    reference = Reference(official)
    assert np.array_equal(reference.token_ids(PROMPT), reference.token_ids("A fox & a hen, 一只狐狸"))
    assert reference.token_ids("").tolist() == [[1]]
    long = reference.token_ids("fox " * 600)
    assert long.shape == (1, TEXT_TOKENS)
    assert long[0, -1] == 1


def test_text_is_zero_after_its_last_token(official):
    reference = Reference(official)
    ids = reference.token_ids(PROMPT)
    text = reference.embeddings(ids)
    assert text.shape == TEXT.shape
    assert not text[:, ids.shape[1] :].any()
    assert text[:, : ids.shape[1]].any(axis=-1).all()


def test_a_missing_tensor_stops_the_load(official, monkeypatch):
    import validate.reference.parts

    def without_one(part, spec):
        return dict(list(diffusers_names(part, spec).items())[:-1])

    diffusers_names = validate.reference.parts.diffusers_names
    monkeypatch.setattr(validate.reference.parts, "diffusers_names", without_one)
    with pytest.raises(RuntimeError, match="Missing key"):
        Reference(official).decode(LATENTS)


def test_one_expert_stays_in_memory(official):
    reference = Reference(official)
    reads = []

    class Counted:
        def __init__(self, part):
            self.part = part

        def read(self, name):
            reads.append(self.part)
            return official.weights[self.part].read(name)

    counted = dataclasses.replace(official, weights={part: Counted(part) for part in official.weights})
    reference = Reference(counted)
    for expert in ("high_noise", "high_noise", "low_noise", "high_noise"):
        reference.velocity(expert, LATENTS, 900.0, TEXT)
    tensors = len(official.weights["high_noise"].names())
    assert reads == ["high_noise"] * tensors + ["low_noise"] * tensors + ["high_noise"] * tensors


def test_sinusoid_of_the_official_code():
    expected = [np.cos(500 * 10000 ** (-3 / 128)), np.sin(500 * 10000 ** (-3 / 128))]
    np.testing.assert_allclose(sinusoid(torch.tensor([500.0]), 256)[0, [3, 131]], expected, atol=1e-7)


def test_diffusers_sinusoid_is_a_little_off():
    features = time_features(np.arange(0, 1000, 7), 256)
    assert 1e-6 < np.abs(features["float64"] - features["float32"]).max() < 1e-4
