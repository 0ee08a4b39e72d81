"""The constants equal those measured on the official code."""

from dataclasses import replace
from math import prod

import pytest

from wan22.errors import UserError
from wan22.parts import rope_split
from wan22.specs import SPECS, T2V_A14B, TI2V_5B, named_after_dimensions, spec_named, tokens


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_model_has_32_decoder_and_24_encoder_caches(spec):
    assert (len(spec.vae.decoder_caches), len(spec.vae.encoder_caches)) == (32, 24)


@pytest.mark.parametrize(
    ("spec", "latent", "decoder", "encoder"),
    [(T2V_A14B, (90, 160), 2.179e9, 1.294e9), (TI2V_5B, (44, 80), 1.608e9, 0.530e9)],
)
def test_cache_elements_at_720p(spec, latent, decoder, encoder):
    def elements(caches):
        return sum(c.channels * c.frames * c.scale**2 * prod(latent) for c in caches)

    assert elements(spec.vae.decoder_caches) == pytest.approx(decoder, rel=1e-3)
    assert elements(spec.vae.encoder_caches) == pytest.approx(encoder, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "size", "frames", "count"),
    [
        (T2V_A14B, (832, 480), 81, 32760),
        (T2V_A14B, (1280, 720), 81, 75600),
        (TI2V_5B, (1280, 704), 121, 27280),
        (TI2V_5B, (832, 480), 121, 12090),
    ],
)
def test_tokens(spec, size, frames, count):
    assert tokens(spec.latent_shape(*size, frames)) == count


def test_the_expert_switches_at_the_boundary():
    assert [T2V_A14B.expert_at(t) for t in (876, 875, 874)] == ["high_noise", "high_noise", "low_noise"]
    assert TI2V_5B.expert_at(999) == "dit"


def test_rope_pairs_of_a_128_wide_head():
    assert rope_split(T2V_A14B.dit.head_width) == (22, 21, 21)


@pytest.mark.parametrize(
    ("size", "hint"), [((833, 480), "832x480"), ((0, 16), "16x16"), ((-16, 16), "16x16"), ((100, 100), "96x96")]
)
def test_a_size_off_the_grid_is_refused_with_the_nearest_good_one(size, hint):
    with pytest.raises(UserError, match=f"use --size {hint}"):
        T2V_A14B.check_size(*size)


@pytest.mark.parametrize(("frames", "hint"), [(80, 81), (0, 1), (-3, 1), (2, 1)])
def test_frames_not_4n_plus_1_are_refused(frames, hint):
    with pytest.raises(UserError, match=f"use --frames {hint}"):
        T2V_A14B.check_frames(frames)


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(UserError, match=r"t2v-a14b, .*ti2v-5b-tiny"):
        spec_named("wan-3")


def test_dimensions_name_the_model():
    tiny = SPECS["t2v-a14b-tiny"]
    assert named_after_dimensions(replace(tiny, name="x", sampling=T2V_A14B.sampling)) is tiny
    odd = replace(T2V_A14B, dit=replace(T2V_A14B.dit, layers=3))
    assert named_after_dimensions(odd).name == "t2v-a14b-custom"
