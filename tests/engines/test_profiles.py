"""Sizes in pixels become ranges of named dimensions, and those become shapes of inputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.profiles import PRESETS, input_shapes, profile_between, profiles_for
from wan22.component import Tensor
from wan22.errors import UserError
from wan22.shapes import fitting_profile, is_static, own_profiles, restrict, sizes_of
from wan22.specs import T2V_A14B, TI2V_5B

LATENTS = Tensor("latents", "float32", (1, 16, "frames", "height", "width"))
ROPE = Tensor("rope_cos", "float32", ("frames", "rows", "columns", 64))
CACHE = Tensor("cache_31", "float32", (1, 96, 2, "8*height", "8*width"))


def test_one_size_is_one_fixed_profile():
    (profile,) = profiles_for(T2V_A14B, "1280x720", "81")
    assert profile["frames"] == (21, 21, 21)
    assert (profile["height"], profile["rows"]) == ((90, 90, 90), (45, 45, 45))
    assert input_shapes(ROPE, profile)[2] == (21, 45, 80, 64)
    assert input_shapes(CACHE, profile)[1] == (1, 96, 2, 720, 1280)
    assert is_static(restrict(profile, [LATENTS, ROPE]))


def test_a_graph_has_the_profiles_that_concern_it_and_no_twins():
    text = Tensor("input_ids", "int64", (1, "tokens"))
    profiles = profiles_for(T2V_A14B, "720p")
    assert len(own_profiles(profiles, [LATENTS])) == 2
    assert own_profiles(profiles, [text]) == ({"tokens": (1, 128, 512)},)
    assert own_profiles(profiles, [Tensor("fixed", "float32", (1, 2))]) == ()


def test_several_sizes_are_a_profile_each():
    landscape, portrait = profiles_for(T2V_A14B, "832x480,480x832", "17..81")
    assert (landscape["height"][2], portrait["height"][2]) == (60, 104)
    assert landscape["frames"] == portrait["frames"] == (5, 21, 21)


def test_a_range_is_one_profile_from_corner_to_corner():
    (profile,) = profiles_for(T2V_A14B, "480x480..1280x720", "1..81")
    assert (profile["width"], profile["height"], profile["frames"]) == ((60, 160, 160), (60, 90, 90), (1, 21, 21))
    assert not is_static(profile)


@pytest.mark.parametrize(("preset", "spec"), [("480p", T2V_A14B), ("720p", T2V_A14B), ("5b", TI2V_5B)])
def test_presets_are_the_official_sizes_in_both_orientations(preset, spec):
    profiles = profiles_for(spec, preset)
    sizes = {(p["width"][2] * spec.vae.spatial_stride, p["height"][2] * spec.vae.spatial_stride) for p in profiles}
    assert sizes <= set(spec.sampling.sizes)
    assert len(sizes) == len(PRESETS[preset].split(",")) == 2


def test_nothing_said_means_the_video_that_the_model_makes_by_default():
    (profile,) = profiles_for(TI2V_5B)
    assert (profile["frames"][2], profile["height"][2], profile["width"][2]) == (31, 44, 80)


@pytest.mark.parametrize(
    ("size", "frames", "message"),
    [
        ("big", None, r"size 'big' .* one of 480p, 720p, 5b"),
        ("", None, "size ''"),
        ("832x480", "", "frames ''"),
        ("832x482", None, "size 832x482"),
        ("832x480", "80", "80 frames"),
        ("832x480", "a lot", "frames 'a lot'"),
        ("1280x720..832x480", None, "the range 1280x720"),
        ("832x480", "81..17", "the range 832x480, 81 frames"),
    ],
)
def test_what_is_no_size_is_refused(size, frames, message):
    with pytest.raises(UserError, match=message):
        profiles_for(T2V_A14B, size, frames)


def test_the_text_may_be_as_short_as_its_end_mark():
    assert profiles_for(T2V_A14B)[0]["tokens"] == (1, 128, 512)


sides, counts = st.integers(2, 80).map(lambda n: 16 * n), st.integers(0, 30).map(lambda n: 4 * n + 1)


@given(st.lists(sides, min_size=4, max_size=4), st.lists(counts, min_size=2, max_size=2))
def test_every_shape_of_a_profile_is_accepted_by_the_check_that_the_runtime_makes(pixels, frames):
    (w0, w1), (h0, h1), (f0, f1) = sorted(pixels[:2]), sorted(pixels[2:]), sorted(frames)
    profile = profile_between(T2V_A14B, (w0, h0, f0), (w1, h1, f1))
    for shapes in zip(*(input_shapes(tensor, profile) for tensor in (LATENTS, ROPE)), strict=True):
        sizes = sizes_of([LATENTS, ROPE], {"latents": shapes[0], "rope_cos": shapes[1]})
        assert fitting_profile(sizes, [profile]) == 0
