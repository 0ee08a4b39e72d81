"""A request → the input tensors of the served model, by ``schema.INPUTS``."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from runtime.request import Request
from triton_repo.schema import CACHE_INPUTS, INPUTS, INPUTS_BY_NAME, NUMPY, Field, Setting
from wan22.errors import UserError
from wan22.inputs import check_regular

WIRE_NAMES = {"STRING": "BYTES"}  # the protocol's name


def inputs_of(request: Request) -> dict[str, Setting | None]:
    """The inputs that describe ``request``; None means the model's default.

    Raises:
        UserError: an image is unreadable, or the server does not support a setting.
    """
    if request.exact_official or request.schedule is not None:
        found = "exact_official or another schedule in a served job"
        raise UserError(found, "neither", "generate without a server")
    values = _values(request, INPUTS)
    return {name: content_of(value) if isinstance(value, Path) else value for name, value in values.items()}


def cache_inputs(request: Request) -> dict[str, Setting | None]:
    """The inputs of the step cache of ``request`` alone."""
    return _values(request, CACHE_INPUTS)


def _values(request: Request, inputs: Sequence[Field]) -> dict[str, Any]:
    getters = {
        field.name: attrgetter(field.of) if isinstance(field.of, str) else field.of for field in inputs if field.of
    }
    return {name: get(request) for name, get in getters.items()}


def content_of(image: bytes | Path | None) -> bytes | None:
    if not isinstance(image, Path):
        return image
    try:
        check_regular(image)
        return image.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        found = f"{image}: {getattr(error, 'strerror', error)}"
        raise UserError(found, "a readable image", "name an image file") from None


def input_tensors(settings: Mapping[str, Setting | None]) -> list[Any]:
    """The tensors for Triton's client, one for every setting that is not None.

    Raises:
        UserError: a setting is unknown, or a value does not fit its type.
    """
    from tritonclient import grpc

    tensors = []
    for name, array in arrays_of(settings).items():
        dtype = INPUTS_BY_NAME[name].dtype
        tensor = grpc.InferInput(name, list(array.shape), WIRE_NAMES.get(dtype, dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def arrays_of(settings: Mapping[str, Setting | None]) -> dict[str, np.ndarray]:
    """The input of the served model for every setting that is not None. Raises as :func:`input_tensors`."""
    for name in settings:
        if name not in INPUTS_BY_NAME:
            raise UserError(f"setting {name!r}", f"one of {', '.join(INPUTS_BY_NAME)}", "name one of them")
    return {name: _array(name, value) for name, value in settings.items() if value is not None}


def _array(name: str, value: Setting) -> np.ndarray:
    dtype = INPUTS_BY_NAME[name].dtype
    if dtype == "UINT8":
        return np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value, np.uint8)
    if isinstance(value, bytes) and name == "noise":
        return np.frombuffer(value, np.float32)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    try:
        return np.array([value], NUMPY[dtype])
    except (OverflowError, ValueError, TypeError):
        raise UserError(f"{name} {value!r}", f"a number that fits {dtype}", "choose another") from None
