"""Cinematic terms in front of a prompt: the labels that Wan2.2's captions use, by group, and named looks made of them.

The model has no parameter for light or camera: such words in the prompt are all there is. What they do to a video was
not measured here. Sources: the labels of the official release's prompt extension (``wan/utils/prompt_extend.py`` and
``system_prompt.py``, Wan-Video/Wan2.2), completed by the categories of Alibaba Cloud's prompt guide for Wan.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from wan22.errors import UserError


@dataclass(frozen=True)
class Group:
    """Terms of which a prompt has at most one. ``option`` is the option of the command line and the page's picker."""

    option: str
    terms: tuple[str, ...]


# In the order in which they stand in the prompt.
GROUPS = {
    "style": Group("style", (
        "Felt style", "3D cartoon style", "Pixel art style", "Puppet animation", "Claymation",
        "Black-and-white animation", "3D game style", "Anime style", "Watercolor style", "Oil painting style",
    )),
    "effect": Group("style", ("Tilt-shift photography", "Time-lapse photography")),
    "time": Group("time", ("Day time", "Night time", "Dawn time", "Sunrise time", "Dusk time", "Sunset time")),
    "light source": Group("light", (
        "Daylight", "Artificial lighting", "Moonlight", "Practical lighting", "Firelight", "Fluorescent lighting",
        "Overcast lighting", "Sunny lighting", "Mixed lighting",
    )),
    "light intensity": Group("light", ("Soft lighting", "Hard lighting")),
    "light angle": Group("light", (
        "Top lighting", "Side lighting", "Underlighting", "Edge lighting", "Backlighting", "Silhouette",
    )),
    "contrast": Group("tone", ("High contrast", "Low contrast")),
    "tone": Group("tone", ("Warm colors", "Cool colors", "Mixed colors")),
    "saturation": Group("tone", ("High saturation", "Low saturation")),
    "shot": Group("shot", (
        "Extreme close-up shot", "Close-up shot", "Medium close-up shot", "Medium shot", "Medium wide shot",
        "Full shot", "Wide shot", "Extreme wide shot",
    )),
    "people": Group("shot", ("Clean single shot", "Two shot", "Three shot", "Group shot", "Establishing shot")),
    "composition": Group("composition", (
        "Center composition", "Balanced composition", "Right-heavy composition", "Left-heavy composition",
        "Symmetrical composition", "Short-side composition",
    )),
    "lens": Group("lens", ("Medium lens", "Wide-angle lens", "Long lens shot", "Telephoto lens", "Fisheye lens")),
    "angle": Group("angle", (
        "Eye-level shot", "Over-the-shoulder shot", "Low angle shot", "High angle shot", "Dutch angle shot",
        "Aerial shot", "Overhead shot",
    )),
    "movement": Group("movement", (
        "Fixed camera", "Camera pushes in", "Camera pulls out", "Camera pans left", "Camera pans right",
        "Camera tilts up", "Camera tilts down", "Handheld camera", "Tracking shot", "Orbit shot", "Drone fly-through",
    )),
}  # fmt: skip
OPTIONS = tuple(dict.fromkeys(group.option for group in GROUPS.values()))
LOOKS = {
    "golden-hour": ("Sunrise time", "Soft lighting", "Edge lighting", "Warm colors", "Wide shot"),
    "noir": ("Night time", "Hard lighting", "Side lighting", "Cool colors", "Dutch angle shot"),
    "documentary": ("Daylight", "Medium shot", "Balanced composition", "Handheld camera"),
    "product": ("Soft lighting", "Top lighting", "Close-up shot", "Center composition", "Fixed camera"),
    "portrait": (
        "Soft lighting", "Side lighting", "Warm colors", "Medium close-up shot", "Short-side composition",
        "Long lens shot",
    ),
    "epic": ("Dawn time", "Mixed colors", "Extreme wide shot", "Aerial shot"),
    "neon": ("Night time", "Artificial lighting", "Mixed colors", "Medium wide shot", "Low angle shot"),
    "storm": ("Overcast lighting", "Cool colors", "Wide shot", "Handheld camera"),
    "clay": ("Claymation",),
    "felt": ("Felt style",),
    "pixel": ("Pixel art style",),
}  # fmt: skip
_GROUP_OF = {term: name for name, group in GROUPS.items() for term in group.terms}
_SPELLED = {name.lower(): name for name in (*_GROUP_OF, *LOOKS)}
_ORDER = list(_GROUP_OF)


def spelled(name: str, option: str = "") -> str:
    """The look or term ``name`` as the tables spell it, whatever its case.

    Args:
        name: a look or a term.
        option: one of :data:`OPTIONS`, or "look", that it has to belong to; empty for any.

    Raises:
        UserError: there is none, or it belongs to another option; offers the nearest.
    """
    known = _SPELLED.get(" ".join(name.lower().split()))
    belongs = "" if known is None else "look" if known in LOOKS else GROUPS[_GROUP_OF[known]].option
    if known is not None and option in ("", belongs):
        return known
    if known is not None:
        raise UserError(f"--{option} {name!r}", f"a term of {option}", f"write --{belongs} {known!r}")
    wanted = [each for each in _SPELLED.values() if option in ("", _option_of(each))]
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in wanted], n=3, cutoff=0.5)
    expected = ", ".join(_SPELLED[each] for each in near) or f"one of {len(wanted)}"
    shown = f"--{option} {name!r}" if option else f"look {name!r}"
    raise UserError(shown, expected, "wan-trt looks lists them")


def _option_of(name: str) -> str:
    return "look" if name in LOOKS else GROUPS[_GROUP_OF[name]].option


def with_terms(prompt: str, names: Sequence[str], *, image: bool = False) -> str:
    """``prompt`` behind the terms of ``names``, as "Night time, Cool colors. A cat": looks and terms, in any order.

    A term replaces the one that a look has in its group, and a camera movement replaces a look's camera angle.

    Args:
        prompt: the user's text.
        names: looks and terms.
        image: the video starts from an image, which settles everything but the camera's movement.

    Raises:
        UserError: an unknown name; two looks or two terms contradict each other; other terms than movements with an
            image.
    """
    if not names:
        return prompt
    known = [spelled(name) for name in names]
    own = _by_group([name for name in known if name not in LOOKS])
    of_looks = _by_group([term for name in known for term in LOOKS.get(name, ())])
    for group, other in (("movement", "angle"), ("angle", "movement")):
        if group in own:
            of_looks.pop(other, None)
    chosen = of_looks | own
    if {"movement", "angle"} <= chosen.keys():
        raise UserError(
            f"{chosen['angle']!r} with {chosen['movement']!r}", "a camera angle or a movement", "leave one of them out"
        )
    if image and (other_terms := [term for group, term in chosen.items() if group != "movement"]):
        expected = "movements of the camera, as the image has light, colors and framing already"
        raise UserError(f"{', '.join(other_terms)} with an image", expected, "leave them out, or use --movement")
    return f"{', '.join(sorted(chosen.values(), key=_ORDER.index))}. {prompt}"


def _by_group(terms: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for term in terms:
        group = _GROUP_OF[term]
        if found.setdefault(group, term) != term:
            raise UserError(f"{found[group]!r} with {term!r}", f"one term of {group}", "leave one of them out")
    return found
