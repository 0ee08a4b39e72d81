"""Engines are refused on another machine, and plans that contradict their manifest."""

from dataclasses import replace

import pytest
from msgspec.structs import replace as replaced

from engines.profiles import profiles_for
from runtime.built_for import check_build, check_plan, check_plans, check_video, default_video
from wan22.bundle import Build, Bundle, Manifest, Source
from wan22.component import Component, File, Tensor
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import SPECS, T2V_A14B
from wan22.stamp import Stamp

PROFILE = {"frames": (5, 5, 9), "height": (8, 8, 8)}
BUILD = Build("rtx4090", "tensorrt-rtx", "1.7.1", "8.9", (PROFILE,), {}, 1.0)
COMMAND = "wan-trt build bundle engines --target rtx4090"
SOURCE = Source("checkpoint", "official", "0")
MANIFEST = Manifest("engines", SPECS["t2v-a14b-tiny"], Precision.FP8, (), (), SOURCE, COMMAND, build=BUILD)
INPUTS = (Tensor("latents", "float32", (1, 16, "frames")),)
COMPONENT = Component("high_noise", File("high_noise.plan", "", 4), (), INPUTS, (), Precision.FP8)
BUILT = Stamp("rtx4090", Precision.FP8, ({"frames": (5, 5, 9)},))


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("1.8.0", "8.9", "engines for rtx4090 have backend_version 1.7.1 | expected this machine's 1.8.0"),
        ("1.7.1", "12.0", "engines for rtx4090 have compute_capability 8.9 | expected this machine's 12.0"),
    ],
)
def test_engines_of_another_machine_are_refused_with_the_command_that_builds_anew(version, capability, message):
    with pytest.raises(UserError) as refused:
        check_build(MANIFEST, version, capability)
    assert str(refused.value) == f"{message} | build here: {COMMAND}"


def test_engines_of_this_machine_are_accepted():
    assert check_build(MANIFEST, "1.7.1", "8.9") == BUILD


def test_a_plan_that_was_built_for_what_the_manifest_says_is_accepted():
    check_plan(BUILT.name, MANIFEST, COMPONENT)


@pytest.mark.parametrize("name", ["", "dit", "Unnamed Network 0"])
def test_a_plan_that_does_not_say_what_it_was_built_for_is_accepted(name):
    check_plan(name, MANIFEST, COMPONENT)


@pytest.mark.parametrize(
    ("manifest", "component", "message"),
    [
        (replace(MANIFEST, build=replace(BUILD, target="rtx5090")), COMPONENT, "target rtx4090 | expected rtx5090"),
        (MANIFEST, replace(COMPONENT, precision=Precision.FP8_ATTN), "precision fp8 | expected fp8-attn"),
        (
            replace(MANIFEST, build=replace(BUILD, profiles=({"frames": (5, 5, 81)},))),
            COMPONENT,
            "profiles ({'frames': (5, 5, 9)},) | expected ({'frames': (5, 5, 81)},)",
        ),
    ],
    ids=["target", "precision", "profiles"],
)
def test_a_manifest_that_contradicts_a_plan_is_refused(manifest, component, message):
    with pytest.raises(UserError) as refused:
        check_plan(BUILT.name, manifest, component)
    assert str(refused.value) == f"high_noise.plan was built for {message} as in the manifest | run {COMMAND}"


def test_a_name_that_another_version_wrote_is_refused():
    with pytest.raises(UserError, match=r"high_noise.plan has the stamp 'wan-trt \{\}'"):
        check_plan("wan-trt {}", MANIFEST, COMPONENT)


def test_the_plans_of_a_bundle_are_checked_in_their_files(tmp_path):
    silent = replace(COMPONENT, name="low_noise", graph=File("low_noise.plan", "", 4))
    bundle = Bundle(tmp_path, replace(MANIFEST, components=(COMPONENT, silent)))
    (tmp_path / "low_noise.plan").write_bytes(b"\0plan")
    (tmp_path / "high_noise.plan").write_bytes(b"\0" + BUILT.name.encode() + b"\0")
    assert check_plans(bundle) == ("low_noise.plan",)
    (tmp_path / "high_noise.plan").write_bytes(b"\0" + replaced(BUILT, target="l4").name.encode() + b"\0")
    with pytest.raises(UserError, match=r"high_noise.plan was built for target l4 \| expected rtx4090"):
        check_plans(bundle)


# -- videos


def engines_for(size, frames=None, fixed=None):
    """The manifest of full-size engines."""
    profiles = () if size is None else profiles_for(T2V_A14B, size, frames)
    build = replace(BUILD, profiles=profiles)
    return replace(MANIFEST, spec=T2V_A14B, build=build, size=fixed)


@pytest.mark.parametrize(
    ("manifest", "video"),
    [
        (engines_for(None), (1280, 720, 81)),
        (engines_for("720p"), (1280, 720, 81)),
        (engines_for("480x480..1280x720", "1..81"), (1280, 720, 81)),
        (engines_for("832x480", "81"), (832, 480, 81)),
        (engines_for("480x832,832x480", "17..49"), (480, 832, 49)),
        (engines_for(None, fixed=(640, 368, 33)), (640, 368, 33)),
    ],
    ids=["any shape", "its preset", "a range with it", "another size", "several others", "fixed graphs"],
)
def test_a_request_that_states_no_video_gets_one_that_the_bundle_makes(manifest, video):
    assert default_video(manifest) == video
    check_video(manifest, video)


@pytest.mark.parametrize(
    ("manifest", "video", "message"),
    [
        (
            engines_for("480x480..1280x720", "5..81"),
            (832, 960, 81),
            "a video of 832x960, 81 frames is outside the engines' shapes | expected width 480 to 1280, height 480 to "
            "720, frames 5 to 81 | choose such a --size and --frames, or build with ones that cover it",
        ),
        (
            engines_for("480p", "81"),
            (1280, 720, 81),
            "a video of 1280x720, 81 frames is outside the engines' shapes | expected 832x480, 81 frames or 480x832, "
            "81 frames | choose such a --size and --frames, or build with ones that cover it",
        ),
        (
            engines_for(None, fixed=(832, 480, 81)),
            (832, 480, 17),
            "a video of 832x480, 17 frames | expected 832x480, 81 frames, which the engines were built for | leave "
            "--size and --frames out",
        ),
    ],
    ids=["a range", "two sizes", "fixed graphs"],
)
def test_what_a_bundle_cannot_make_is_refused_in_pixels_and_frames(manifest, video, message):
    with pytest.raises(UserError) as refused:
        check_video(manifest, video)
    assert str(refused.value) == message
