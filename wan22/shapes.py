"""Named dimensions: their sizes in a call, the shapes that follow, and whether an engine supports them.

A graph's inputs and outputs share dimension names (``wan22.component.Tensor``): "frames", "height" and "width" of the
latents, "rows" and "columns" of the token grid (half of those), "tokens" of text, and multiples such as "8*height".
Engines store only ranges of the names; the builder and the runtime derive everything else with this module. It also
parses sizes that users type.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from wan22.component import Tensor
from wan22.errors import UserError, shortened
from wan22.specs import PATCH

Profile = dict[str, tuple[int, int, int]]  # named dimension → min, opt, max
MOST_DIGITS = 6  # of a width or height that somebody types
HALVES = {"rows": ("height", PATCH[1]), "columns": ("width", PATCH[2])}


def parse_size(
    text: str, expected: str = "width x height in pixels", remedy: str = "write it as 832x480"
) -> tuple[int, int]:
    """Parse ``"832x480"`` to (832, 480); x may be X, × or *, with spaces around it.

    Raises:
        UserError: ``text`` is not a size; the message uses ``expected`` and ``remedy``.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX×*]\s*(\d+)\s*", text)
    if not match:
        raise UserError(f"size {text!r}", expected, remedy)
    if max(map(len, match.groups())) > MOST_DIGITS:
        raise UserError(f"size {shortened(text)}", f"at most {MOST_DIGITS} digits a side", remedy)
    return int(match[1]), int(match[2])


def parts_of(dim: str) -> tuple[int, str]:
    """The factor and name of a dimension: ``"8*height"`` → 8, "height"."""
    factor, star, name = dim.partition("*")
    return (int(factor), name.strip()) if star else (1, dim)


def names_in(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """The dimension names in ``tensors``, in order of appearance."""
    named = (parts_of(dim)[1] for tensor in tensors for dim in tensor.dims if isinstance(dim, str))
    return tuple(dict.fromkeys(named))


def shape_of(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of ``tensor`` for the given ``sizes`` of dimension names."""
    return tuple(dim if isinstance(dim, int) else parts_of(dim)[0] * sizes[parts_of(dim)[1]] for dim in tensor.dims)


def restrict(profile: Profile, tensors: Iterable[Tensor]) -> Profile:
    """The entries of ``profile`` for dimensions of ``tensors``."""
    return {name: profile[name] for name in names_in(tensors)}


def own_profiles(profiles: Sequence[Profile], tensors: Sequence[Tensor]) -> tuple[Profile, ...]:
    """``profiles`` restricted to the dimensions of a graph's inputs ``tensors``, without duplicates, in order.

    The builder creates one optimisation profile for each; the runtime selects one by index.
    """
    own: list[Profile] = []
    for profile in profiles:
        if (part := restrict(profile, tensors)) and part not in own:
            own.append(part)
    return tuple(own)


def is_static(profile: Profile) -> bool:
    """True if every dimension has one size, so that a CUDA graph can capture an engine with this profile."""
    return all(low == high for low, _, high in profile.values())


def sizes_of(tensors: Iterable[Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The size of every dimension name, derived from the shapes of a call.

    Raises:
        ValueError: a rank or a fixed dimension differs, or a name has two sizes.
    """
    found: dict[str, tuple[int, str]] = {}
    for tensor in tensors:
        shape = tuple(shapes[tensor.name])
        if len(shape) != len(tensor.dims):
            raise ValueError(f"{tensor.name} has shape {shape}, expected {len(tensor.dims)} dimensions {tensor.dims}")
        for dim, size in zip(tensor.dims, shape, strict=True):
            _agree(found, tensor.name, dim, size)
    for half, (whole, parts) in HALVES.items():
        if half in found and whole in found and found[half][0] * parts != found[whole][0]:
            mismatch = f"{half} is {found[half][0]} in {found[half][1]}"
            expected = f"{whole} / {parts} = {found[whole][0] / parts:g} ({found[whole][1]})"
            raise ValueError(f"{mismatch}, expected {expected}")
    return {name: size for name, (size, _) in found.items()}


def _agree(found: dict[str, tuple[int, str]], tensor: str, dim: int | str, size: int) -> None:
    if isinstance(dim, int):
        if size != dim:
            raise ValueError(f"{tensor} has a dimension of {size}, expected {dim}")
        return
    factor, name = parts_of(dim)
    known, where = found.setdefault(name, (size // factor, tensor))
    if known * factor != size:
        raise ValueError(f"{dim} is {size} in {tensor}, expected {known * factor} as in {where}")


def fitting_profile(sizes: Mapping[str, int], profiles: Sequence[Profile]) -> int:
    """The index of the first profile that contains ``sizes``; 0 if ``profiles`` is empty.

    Raises:
        UserError: no profile does; names the dimensions outside the closest one.
    """
    outside = [
        [name for name in profile if name in sizes and not profile[name][0] <= sizes[name] <= profile[name][2]]
        for profile in profiles
    ]
    for index, dims in enumerate(outside):
        if not dims:
            return index
    if not profiles:
        return 0
    closest = min(range(len(profiles)), key=lambda index: len(outside[index]))
    found = ", ".join(f"{name} {sizes[name]}" for name in outside[closest])
    ranges = " or ".join(_ranges(profile, outside[closest]) for profile in profiles)
    raise UserError(f"{found} (in latents)", ranges, "run wan-trt build with --size and --frames that include it")


def _ranges(profile: Profile, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {profile[name][0]}…{profile[name][2]}" for name in names if name in profile)
