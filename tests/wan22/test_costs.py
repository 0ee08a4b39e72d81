"""Parameters and FLOPs computed from specs equal those counted on the models (wan22.md)."""

from dataclasses import replace

import pytest

from wan22.costs import (
    block_parameters,
    cache_elements,
    decoder_layers,
    dit_flops,
    dit_parameters,
    encoder_layers,
    model_parameters,
    text_encoder_flops,
    text_encoder_parameters,
    vae_flops,
    vae_parameters,
)
from wan22.specs import I2V_A14B, T2V_A14B, TI2V_5B, tokens


@pytest.mark.parametrize(
    ("spec", "parameters", "block", "linear"),
    [
        (T2V_A14B, 14_288_491_584, 351_394_304, 351_272_960),
        (I2V_A14B, 14_288_901_184, 351_394_304, 351_272_960),
        (TI2V_5B, 4_999_787_712, 163_656_704, 163_577_856),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parameters_of_the_transformers(spec, parameters, block, linear):
    assert dit_parameters(spec.dit) == parameters
    assert (block_parameters(spec.dit).total, block_parameters(spec.dit).linear) == (block, linear)


def test_parameters_of_the_text_encoder():
    assert text_encoder_parameters(T2V_A14B.text_encoder) == 5_680_910_336


@pytest.mark.parametrize(
    ("spec", "encoder", "decoder"),
    [(T2V_A14B, 53_595_872 + 1_056, 73_295_331 + 272), (TI2V_5B, 149_627_776 + 9_312, 555_049_228 + 2_352)],
    ids=["2.1", "2.2"],
)
def test_parameters_of_the_vaes(spec, encoder, decoder):
    assert vae_parameters(spec.vae) == {"vae_encoder": encoder, "vae_decoder": decoder}


@pytest.mark.parametrize(
    ("spec", "video", "count", "linears", "self_attention", "cross_attention", "total"),
    [
        (T2V_A14B, (832, 480, 49), 20_280, 0.485, 0.337, 0.009, 0.833),
        (T2V_A14B, (832, 480, 81), 32_760, 0.783, 0.879, 0.014, 1.678),
        (T2V_A14B, (832, 480, 121), 48_360, 1.156, 1.916, 0.020, 3.095),
        (T2V_A14B, (1280, 720, 81), 75_600, 1.807, 4.682, 0.032, 6.523),
        (T2V_A14B, (1280, 720, 121), 111_600, 2.668, 10.20, 0.047, 12.92),
        (TI2V_5B, (1280, 704, 121), 27_280, 0.237, 0.274, 0.005, 0.517),
        (TI2V_5B, (1280, 704, 81), 18_480, 0.160, 0.126, 0.004, 0.290),
        (TI2V_5B, (832, 480, 121), 12_090, 0.105, 0.054, 0.002, 0.162),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_petaflop_of_a_forward(spec, video, count, linears, self_attention, cross_attention, total):
    """Every row of the table in §2.8; linears stand there without those of the text (at most 2.1 TF)."""
    assert tokens(spec.latent_shape(*video)) == count
    flops = dit_flops(spec.dit, count)
    assert flops.linears / 1e15 == pytest.approx(linears, abs=0.0027)
    assert flops.self_attention / 1e15 == pytest.approx(self_attention, rel=1e-3, abs=5e-4)
    assert flops.cross_attention / 1e15 == pytest.approx(cross_attention, abs=6e-4)  # printed to one digit
    assert flops.total / 1e15 == pytest.approx(total, rel=1e-3, abs=2e-3)


def test_teraflop_of_the_text_encoder_at_its_longest():
    assert text_encoder_flops(T2V_A14B.text_encoder) / 1e12 == pytest.approx(4.8, abs=0.05)


@pytest.mark.parametrize(
    ("spec", "video", "layers", "first", "later"),
    [
        (T2V_A14B, (1280, 720, 81), decoder_layers, 10.2, 31.5),
        (T2V_A14B, (832, 480, 81), decoder_layers, 4.35, 13.6),
        (TI2V_5B, (1280, 704, 121), decoder_layers, 20.6, 66.4),
        (T2V_A14B, (1280, 720, 81), encoder_layers, 6.45, 18.8),
        (T2V_A14B, (832, 480, 81), encoder_layers, 2.72, 8.05),
        (TI2V_5B, (1280, 704, 121), encoder_layers, 4.22, 12.6),
    ],
)
def test_teraflop_of_a_vae_chunk(spec, video, layers, first, later):
    """The figures are those of the official code, which also multiplies the zeros before the first frame."""
    size, ours, following = spec.latent_shape(*video)[-2:], *(list(layers(spec.vae, chunk)) for chunk in (True, False))
    official = [replace(layer, taps=padded.taps) for layer, padded in zip(ours, following, strict=True)]
    counted = [sum(layer.flops(size) for layer in chunk) / 1e12 for chunk in (official, following)]
    assert counted == pytest.approx([first, later], rel=6e-3)


def test_a_720p_decode_is_about_640_teraflop_less_what_the_first_frame_multiplies_with_zeros():
    zeros = 10.2 - 4.1
    assert vae_flops(T2V_A14B.vae, "vae_decoder", (90, 160), 21) / 1e12 == pytest.approx(640 - zeros, rel=0.002)


@pytest.mark.parametrize(
    ("spec", "half", "size", "elements"),
    [
        (T2V_A14B, "vae_decoder", (90, 160), 2.179e9),
        (TI2V_5B, "vae_decoder", (44, 80), 1.608e9),
        (T2V_A14B, "vae_encoder", (90, 160), 1.294e9),
        (TI2V_5B, "vae_encoder", (44, 80), 0.530e9),
    ],
)
def test_numbers_in_the_caches(spec, half, size, elements):
    assert cache_elements(spec.vae, half, size) == pytest.approx(elements, rel=1e-3)


def test_parts_are_those_that_the_model_runs():
    assert list(model_parameters(T2V_A14B)) == ["text_encoder", "high_noise", "low_noise", "vae_decoder"]
    assert list(model_parameters(TI2V_5B)) == ["text_encoder", "dit", "vae_encoder", "vae_decoder"]
