"""Terms in front of a prompt: exact labels, a fixed order, and contradictions that name both sides."""

import pytest

from runtime.recipe import read_recipe
from runtime.request import Request
from wan22.errors import UserError
from wan22.looks import GROUPS, LOOKS, with_terms
from wan22.specs import SPECS
from wan_trt.cli import app

# The labels of the official release's system prompt, copied by hand.
OFFICIAL = """Day time, Night time, Dawn time, Sunrise time, Daylight, Artificial lighting, Moonlight, Practical
lighting, Firelight, Fluorescent lighting, Overcast lighting, Sunny lighting, Soft lighting, Hard
lighting, Top lighting, Side lighting, Underlighting, Edge lighting, Warm colors, Cool colors, Mixed
colors, Extreme close-up shot, Close-up shot, Medium close-up shot, Medium shot, Medium wide shot,
Wide shot, Extreme wide shot, Over-the-shoulder shot, Low angle shot, High angle shot, Dutch angle
shot, Aerial shot, Overhead shot, Center composition, Balanced composition, Right-heavy composition,
Left-heavy composition, Symmetrical composition, Short-side composition"""


def test_the_official_labels_are_there_as_they_are_spelled():
    terms = {term for group in GROUPS.values() for term in group.terms}
    assert not {label.strip() for label in OFFICIAL.replace("\n", " ").split(",")} - terms
    assert len(terms) == sum(len(group.terms) for group in GROUPS.values()), "a term in two groups"


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_composes_and_has_one_term_of_a_group(look):
    said = with_terms("A cat", [look])
    assert said.endswith(". A cat")
    assert sorted(said.removesuffix(". A cat").split(", ")) == sorted(LOOKS[look])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "A cat"),
        (["noir"], "Night time, Hard lighting, Side lighting, Cool colors, Dutch angle shot. A cat"),
        (["warm  COLORS"], "Warm colors. A cat"),
        (
            ["golden-hour", "Close-up shot", "Edge lighting"],
            "Sunrise time, Soft lighting, Edge lighting, Warm colors, Close-up shot. A cat",
        ),
        (["Close-up shot", "clay", "Night time"], "Claymation, Night time, Close-up shot. A cat"),
        (["epic", "Camera pans left"], "Dawn time, Mixed colors, Extreme wide shot, Camera pans left. A cat"),
        (["documentary", "Aerial shot"], "Daylight, Medium shot, Balanced composition, Aerial shot. A cat"),
    ],
)
def test_terms_stand_in_front_in_the_order_of_the_groups(names, said):
    assert with_terms("A cat", names) == said


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["Night time", "Dawn time"], "'Night time' with 'Dawn time' | expected one term of time"),
        (["noir", "golden-hour"], "'Night time' with 'Sunrise time' | expected one term of time"),
        (["Aerial shot", "Camera pans left"], "'Aerial shot' with 'Camera pans left' | expected a camera angle or a"),
        (["golden hour"], "look 'golden hour' | expected golden-hour"),
        (["xyzzy"], "look 'xyzzy' | expected one of"),
    ],
)
def test_contradictions_name_both_and_unknown_names_the_nearest(names, told):
    with pytest.raises(UserError) as refused:
        with_terms("A cat", names)
    assert str(refused.value).startswith(told)


def test_an_image_takes_movements_alone():
    assert with_terms("It waves", ["Camera pans left"], image=True) == "Camera pans left. It waves"
    with pytest.raises(UserError, match=r"Night time.* with an image \| expected movements"):
        with_terms("It waves", ["noir"], image=True)


def test_a_completed_request_has_the_whole_text_and_repeats_without_the_terms():
    spec = SPECS["t2v-a14b"]
    complete = Request("A cat", terms=("noir",)).completed(spec)
    assert complete.prompt == with_terms("A cat", ["noir"])
    assert Request(complete.prompt).completed(spec).prompt == complete.prompt


def test_generate_composes_and_records_the_text(tiny_engines, tmp_path, capsys):
    words = ["generate", str(tiny_engines), "A cat", "--size", "64x64", "--frames", "1", "--steps", "1"]
    made, again = tmp_path / "made.png", tmp_path / "again.png"
    with pytest.raises(SystemExit) as left:
        app([*words, "-o", str(made), "--look", "golden-hour", "--shot", "close-up shot", "--light", "Edge lighting"])
    assert left.value.code in (0, None)
    said = "Sunrise time, Soft lighting, Edge lighting, Warm colors, Close-up shot. A cat"
    assert read_recipe(made).prompt == said
    with pytest.raises(SystemExit):
        app(["generate", str(tiny_engines), "--again", str(made), "-o", str(again)])
    assert again.read_bytes() == made.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        app([*words, "-o", str(made), "--shot", "Edge lighting"])
    assert left.value.code == 2
    assert "write --light 'Edge lighting'" in capsys.readouterr().err
