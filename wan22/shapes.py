"""Named dimensions: what an engine checks before it touches a device, and what shape profiles are made of.

A dimension of a tensor is a number, a name ("height"), or a multiple of a name ("8*height").
"""

from collections.abc import Iterable, Mapping
from math import prod

from wan22.bundle import Tensor
from wan22.errors import UserError


def dimension(dim: int | str, values: Mapping[str, int]) -> int:
    """The number that ``dim`` stands for, given its names' values."""
    if isinstance(dim, int):
        return dim
    return prod(int(part) if part.isdigit() else values[part] for part in dim.split("*"))


def names_in(tensors: Iterable[Tensor]) -> set[str]:
    """Every dimension name of ``tensors``, multiples reduced to their name."""
    dims = (dim for tensor in tensors for dim in tensor.dims if isinstance(dim, str))
    return {part for dim in dims for part in dim.split("*") if not part.isdigit()}


def bind(tensors: Iterable[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The value of every dimension name that makes ``shapes`` fit ``tensors``.

    Raises:
        ValueError: a rank or number that differs, or a name that would need two values; the tensor is named.
    """
    values: dict[str, int] = {}
    for tensor in tensors:
        shape = shapes[tensor.name]
        if len(shape) != len(tensor.dims):
            raise ValueError(f"{tensor.name} has shape {list(shape)} | expected {list(tensor.dims)}")
        for dim, size in zip(tensor.dims, shape, strict=True):
            if not _fits(dim, size, values):
                known = {n: values[n] for n in names_in([tensor]) if n in values}
                raise ValueError(f"{tensor.name} has shape {list(shape)} | expected {list(tensor.dims)} with {known}")
    return values


def _fits(dim: int | str, size: int, values: dict[str, int]) -> bool:
    if isinstance(dim, int):
        return dim == size
    parts = dim.split("*")
    factor = prod(int(part) for part in parts if part.isdigit())
    name = next(part for part in parts if not part.isdigit())
    return size % factor == 0 and values.setdefault(name, size // factor) == size // factor


def check_profile(values: Mapping[str, int], profile: Mapping[str, tuple[int, int, int]], what: str) -> None:
    """Refuses dimension ``values`` outside ``profile`` (name → min, opt, max). An empty profile admits all."""
    for name, value in values.items():
        low, _, high = profile.get(name, (value, value, value))
        if not low <= value <= high:
            raise UserError(
                f"{what}: {name} = {value}",
                f"{low} to {high}, the shapes it was built for",
                "generate at another size or build again with a wider --size and --frames",
            )
