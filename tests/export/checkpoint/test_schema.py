"""The tensor table has exactly the tensors and parameters that were counted on the official models (wan22.md §1.2)."""

from math import prod

import pytest

from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK, dit_tensors, part_tensors, text_encoder_tensors, vae_tensors
from wan22.specs import I2V_A14B, SPECS, T2V_A14B, TI2V_5B


def parameters(shapes, prefix=""):
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


@pytest.mark.parametrize(
    ("spec", "tensors", "count"),
    [(T2V_A14B, 1095, 14_288_491_584), (I2V_A14B, 1095, 14_288_901_184), (TI2V_5B, 825, 4_999_787_712)],
    ids=lambda value: getattr(value, "name", None),
)
def test_transformer_parameters(spec, tensors, count):
    shapes = dit_tensors(spec.dit)
    assert (len(shapes), parameters(shapes)) == (tensors, count)


@pytest.mark.parametrize(
    ("spec", "block", "linears"), [(T2V_A14B, 351_394_304, 351_272_960), (TI2V_5B, 163_656_704, 163_577_856)]
)
def test_parameters_of_one_block(spec, block, linears):
    shapes = dit_tensors(spec.dit)
    assert parameters(shapes, "blocks.7.") == block
    assert sum(prod(shapes[f"blocks.7.{name}.weight"]) for name in DIT_LINEARS_PER_BLOCK) == linears


@pytest.mark.parametrize(
    ("spec", "tensors", "counts"),
    [
        (
            T2V_A14B,
            194,
            {"": 126_892_531, "encoder.": 53_595_872, "decoder.": 73_295_331, "conv1.": 1_056, "conv2.": 272},
        ),
        (
            TI2V_5B,
            196,
            {"": 704_688_668, "encoder.": 149_627_776, "decoder.": 555_049_228, "conv1.": 9_312, "conv2.": 2_352},
        ),
    ],
)
def test_vae_parameters(spec, tensors, counts):
    shapes = vae_tensors(spec.vae)
    assert len(shapes) == tensors
    assert {prefix: parameters(shapes, prefix) for prefix in counts} == counts


def test_text_encoder_parameters():
    shapes = text_encoder_tensors(T2V_A14B.text_encoder)
    assert (len(shapes), parameters(shapes)) == (242, 5_680_910_336)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_part_of_every_model_is_tabled(spec):
    assert all(part_tensors(part, spec) for part in (*spec.experts, "dit", "text_encoder", "vae"))
    with pytest.raises(KeyError):
        part_tensors("image_encoder", spec)


def test_names_in_the_wild():
    """A few names read off published key lists, one of each kind."""
    vae21, vae22 = vae_tensors(T2V_A14B.vae), vae_tensors(TI2V_5B.vae)
    assert vae21["decoder.upsamples.3.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert vae21["decoder.upsamples.4.shortcut.weight"] == (384, 192, 1, 1, 1)
    assert vae21["encoder.downsamples.5.resample.1.weight"] == (192, 192, 3, 3)
    assert vae22["decoder.upsamples.2.upsamples.0.residual.2.weight"] == (512, 1024, 3, 3, 3)
    assert vae22["encoder.downsamples.1.downsamples.2.time_conv.bias"] == (320,)
