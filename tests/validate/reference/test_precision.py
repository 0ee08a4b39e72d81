"""The reference in less than float32: how far each precision takes it, and that nothing else changes."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from export.checkpoint.checkpoint import open_checkpoint
from validate.ladder.metrics import compare
from validate.reference.precision import Fp8Attention, Fp8Linear
from validate.reference.reference import Reference
from wan22.specs import SPECS, TEXT_TOKENS, Precision

SPEC = SPECS["t2v-a14b-tiny"]
RANDOM = np.random.default_rng(0)
LATENTS = RANDOM.standard_normal(SPEC.latent_shape(32, 32, 5), np.float32)
TEXT = RANDOM.standard_normal((1, TEXT_TOKENS, SPEC.dit.text_width), np.float32)
UNIT = {Precision.FP16: 2.0**-11, Precision.BF16: 2.0**-8, Precision.FP8: 2.0**-4, Precision.FP8_ATTN: 2.0**-4}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(tiny_checkpoint)


@pytest.mark.parametrize("precision", UNIT)
def test_a_velocity_errs_as_its_mantissa_says(checkpoint, precision):
    exact, lowered = Reference(checkpoint), Reference(checkpoint, precisions={"high_noise": precision})
    found, expected = (side.velocity("high_noise", LATENTS, 900.0, TEXT) for side in (lowered, exact))
    assert 0.2 * UNIT[precision] < compare(found, expected).relative_l2 < 3 * UNIT[precision]


def test_components_have_precisions_of_their_own(checkpoint):
    exact, lowered = Reference(checkpoint), Reference(checkpoint, precisions={"vae_decoder_first": Precision.BF16})
    assert np.array_equal(*(side.velocity("low_noise", LATENTS, 9.0, TEXT) for side in (exact, lowered)))
    assert 1e-3 < compare(*(side.decode(LATENTS) for side in (lowered, exact))).relative_l2 < 4e-2


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_text_is_encoded_in_16_bits(checkpoint, precision):
    exact, lowered = Reference(checkpoint), Reference(checkpoint, precisions={"text_encoder": precision})
    ids = exact.token_ids("A fox")
    found = compare(lowered.embeddings(ids), exact.embeddings(ids))
    assert 0.2 * UNIT[precision] < found.relative_l2 < 3 * UNIT[precision]


def test_fp8_products_of_numbers_that_fp8_has_are_exact():
    x = torch.tensor([[448.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    weight, bias = torch.tensor([[448.0, 1.0, -3.0, 0.25]]), torch.tensor([0.125])
    assert torch.equal(Fp8Linear(weight, bias)(x), functional.linear(x, weight, bias))


def test_fp8_attention_does_not_feel_what_all_keys_share():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v)
    with Fp8Attention():
        plain, shifted = (functional.scaled_dot_product_attention(q, keys, v) for keys in (k, k + 40.0))
    for found in (plain, shifted):
        assert 1e-3 < compare(found.numpy(), expected.numpy()).relative_l2 < 6e-2
