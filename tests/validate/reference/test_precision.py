"""The reference in lower precision: the size of its error, and that nothing else changes."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from export.checkpoint.checkpoint import open_checkpoint
from validate.ladder.metrics import compare
from validate.reference.precision import Fp8Linear, Int8Linear, attention_of, onednn_convolutions
from validate.reference.reference import Reference
from wan22.precision import Precision
from wan22.specs import SPECS, TEXT_TOKENS

SPEC = SPECS["t2v-a14b-tiny"]
RANDOM = np.random.default_rng(0)
LATENTS = RANDOM.standard_normal(SPEC.latent_shape(32, 32, 5), np.float32)
TEXT = RANDOM.standard_normal((1, TEXT_TOKENS, SPEC.dit.text_width), np.float32)
UNIT = {
    Precision.FP16: 2.0**-11,
    Precision.BF16: 2.0**-8,
    Precision.FP8: 2.0**-4,
    Precision.FP8_ATTN: 2.0**-4,
    Precision.INT8: 2.0**-6,
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(tiny_checkpoint)


@pytest.mark.parametrize("precision", UNIT)
def test_the_error_of_a_velocity_follows_its_mantissa(checkpoint, precision):
    exact, lowered = Reference(checkpoint), Reference(checkpoint, precisions={"high_noise": precision})
    found, expected = (side.velocity("high_noise", LATENTS, 900.0, TEXT) for side in (lowered, exact))
    assert 0.2 * UNIT[precision] < compare(found, expected).relative_l2 < 3 * UNIT[precision]


def test_each_component_has_its_precision(checkpoint):
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


def test_int8_products_of_integers_are_exact():
    x = torch.tensor([[127.0, -2.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    weight, bias = torch.tensor([[127.0, 1.0, -3.0, 2.0], [0.5, 0.0, -63.5, 1.0]]), torch.tensor([0.125, 3.0])
    assert torch.equal(Int8Linear(weight, bias)(x), functional.linear(x, weight, bias))


def test_fp8_attention_ignores_what_all_keys_share():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v)
    with attention_of(Precision.FP8_ATTN):
        plain, shifted = (functional.scaled_dot_product_attention(q, keys, v) for keys in (k, k + 40.0))
    for found in (plain, shifted):
        assert 1e-3 < compare(found.numpy(), expected.numpy()).relative_l2 < 6e-2


# -- convolutions are faster inside the block, with the same values

VIDEO = torch.randn(1, 16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
KERNEL = torch.randn(24, 16, 3, 3, 3, generator=torch.Generator().manual_seed(1)) / 20
BIAS = torch.linspace(-1, 1, 24)


def kernels_of(function):
    """Names of the operators that ``function`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": (2, 1, 1), "padding": (0, 1, 1)}])
def test_the_values_stay(options):
    expected = functional.conv3d(VIDEO.double(), KERNEL.double(), BIAS.double(), **options)
    layer = torch.nn.Conv3d(16, 24, 3, **options)
    layer.load_state_dict({"weight": KERNEL, "bias": BIAS})
    with onednn_convolutions(), torch.inference_mode():
        found = layer(VIDEO)
    assert compare(found, expected).relative_l2 < 1e-6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_small_ones_no_longer_take_the_slow_kernel():
    layer = torch.nn.Conv3d(16, 24, 3).requires_grad_(False)
    assert "aten::slow_conv3d_forward" in kernels_of(lambda: layer(VIDEO))
    with onednn_convolutions():
        assert not {"aten::slow_conv3d_forward"} & kernels_of(lambda: layer(VIDEO))


def test_other_types_are_left_alone():
    with onednn_convolutions():
        found = functional.conv3d(VIDEO.double(), KERNEL.double())
    assert torch.equal(found, functional.conv3d(VIDEO.double(), KERNEL.double()))
