"""The shapes that an engine is built for, from the user's pixels and frames.

One size (``832x480``), several (``832x480,480x832``: one optimisation profile each, so each has its own kernels) or a
range (``480x480..1280x720``: one profile, with scratch memory for its largest size). Frames are one number or a range.
Presets name the sizes of the official release.
"""

import re
from collections.abc import Sequence
from math import prod

from wan22.component import Tensor, grouped_name
from wan22.errors import UserError
from wan22.parts import VaeSpec
from wan22.quantities import video_text
from wan22.shapes import Profile, parse_size, shape_of
from wan22.specs import PATCH, TEXT_TOKENS, ModelSpec
from wan22.strips import SIDES, Half, check_strips, cut_axis, strips_of, widest

PRESETS = {"480p": "832x480,480x832", "720p": "1280x720,720x1280", "5b": "1280x704,704x1280"}
TYPICAL_TEXT_TOKENS = 128  # about the length of the default negative prompt

MOST_SLICES = 64  # of the tokens of a video, for stages that take slices
STEPS = (1, 40, 2048)  # time rows of a schedule

Video = tuple[int, int, int]  # width, height in pixels; frames


def profiles_for(spec: ModelSpec, size: str | None = None, frames: str | None = None) -> tuple[Profile, ...]:
    """The profiles for ``--size`` and ``--frames``; the model's default video for those not given.

    Raises:
        UserError: malformed text, a size or number of frames that the model does not support, a reversed range.
    """
    asked = "{}x{}".format(*spec.sampling.sizes[0]) if size is None else PRESETS.get(size, size)
    counts = _frames(str(spec.sampling.frames) if frames is None else frames)
    ranges = [part.partition("..") for part in asked.split(",")]
    corners = dict.fromkeys((_size(small), _size(large or small)) for small, _, large in ranges)
    return tuple(profile_between(spec, (*small, counts[0]), (*large, counts[1])) for small, large in corners)


def profile_between(spec: ModelSpec, small: Video, large: Video) -> Profile:
    """The profile that contains every video from ``small`` to ``large``, tuned for ``large``."""
    low, high = (spec.latent_shape(*video)[-3:] for video in (small, large))
    if any(a > b for a, b in zip(low, high, strict=True)):
        found = f"the range {video_text(*small)} to {video_text(*large)}"
        raise UserError(found, "no side larger at its start than at its end", "give two ranges or sizes")
    names = ("frames", "height", "width")
    profile = {name: (a, b, b) for name, a, b in zip(names, low, high, strict=True)}
    for half, whole in (("rows", "height"), ("columns", "width")):
        a, b, _ = profile[whole]
        profile[half] = (a // PATCH[1], b // PATCH[1], b // PATCH[1])
    return profile | {"tokens": (1, TYPICAL_TEXT_TOKENS, TEXT_TOKENS)}


def with_stages(profile: Profile, groups: Sequence[int] = ()) -> Profile:
    """``profile`` with the dimensions of a transformer in stages: tokens, in slices or as a whole, and time steps.

    ``groups`` are numbers of devices that may divide the tokens; each has a dimension for the tokens of one of them.
    """
    fewest, most = (prod(profile[name][end] for name in ("frames", "rows", "columns")) for end in (0, 2))
    shares = {count: (max(1, fewest // (MOST_SLICES * count)), -(-most // count)) for count in (1, *groups)}
    own = {grouped_name("positions", count): (least, share, share) for count, (least, share) in shares.items()}
    smallest = min(least for least, _ in shares.values())  # the ends of a forward have no form for groups
    return profile | own | {"positions": (smallest, most, most), "keys": (fewest, most, most), "steps": STEPS}


def with_strips(profile: Profile, spec: VaeSpec, most: int, usual: int) -> Profile:
    """``profile`` with the sides of strips of a VAE: 1 to ``most`` of the longer side, tuned for ``usual`` ones.

    Raises:
        UserError: the smallest picture has fewer rows or columns.
    """
    sizes = [(profile["height"][end], profile["width"][end]) for end in range(3)]
    check_strips(most, sizes[0])
    low, best, high = sizes
    halves: tuple[Half, ...] = ("vae_decoder", "vae_encoder")
    strips: Profile = {}
    for axis, name in enumerate(SIDES):
        least = low[axis]
        if any(cut_axis(size) == axis for size in ((low[0], high[1]), (high[0], low[1]))):
            least = min(strip.extent for half in halves for strip in strips_of(spec, half, low[axis], most))
        strips[name] = (least, max(least, widest(spec, "vae_decoder", best, usual)[axis]), high[axis])
    return profile | strips


def input_shapes(tensor: Tensor, profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``tensor`` at the profile's minimum, optimum and maximum."""
    low, best, high = ({name: sizes[which] for name, sizes in profile.items()} for which in range(3))
    return shape_of(tensor, low), shape_of(tensor, best), shape_of(tensor, high)


def _size(text: str) -> tuple[int, int]:
    expected = f"WIDTHxHEIGHT, several of them, SMALL..LARGE, or one of {', '.join(PRESETS)}"
    return parse_size(text, expected, "for example --size 832x480")


def _frames(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d{1,6})(?:\.\.(\d{1,6}))?\s*", text)
    if not match:
        raise UserError(f"frames {text!r}", "a number, or FEWEST..MOST", "for example --frames 81 or --frames 17..81")
    return int(match[1]), int(match[2] or match[1])
