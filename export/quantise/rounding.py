"""Matrices of codes with one scale for every row: FP8 and INT8."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from export.files.tensor_file import as_torch, check_finite
from export.graphs.linear import CODES
from wan22.precision import Number

PIECE_ELEMENTS, BLOCK_ELEMENTS = 2**22, 2**16
SMALLEST_SCALE = 1e-12


def row_scales(name: str, matrix: np.ndarray, factor: np.ndarray | None, largest_code: float) -> np.ndarray:
    """The scale of every row of ``matrix [out, in]``, divided by ``factor [in]`` if there is one: float32 [out].

    Raises:
        UserError: the matrix holds NaN or infinity.
    """
    import torch

    tensor, divisors = as_torch(matrix), None if factor is None else torch.from_numpy(factor)
    found = np.empty(len(tensor), np.float32)
    rows = max(1, BLOCK_ELEMENTS // tensor.shape[1])
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        if divisors is not None:
            part = part.float() / divisors
        smallest, largest = torch.aminmax(part, dim=1)
        found[start : start + rows] = torch.maximum(-smallest, largest).float().numpy()
    check_finite(name, np.array([found.max(initial=0.0)], np.float32))
    return np.maximum(found, np.float32(SMALLEST_SCALE)) / np.float32(largest_code)


def rounded(matrix: np.ndarray, scales: np.ndarray, factor: np.ndarray | None, number: Number) -> Iterator[np.ndarray]:
    """The codes of ``matrix``, flat, in pieces; in cache-sized blocks, so memory is read and written only once."""
    import torch

    tensor, divisors = as_torch(matrix), None if factor is None else torch.from_numpy(factor)
    of_rows, limit = torch.from_numpy(np.ascontiguousarray(scales))[:, None], CODES[number].largest
    whole = number is Number.INT8
    at_once, in_cache = (max(1, elements // tensor.shape[1]) for elements in (PIECE_ELEMENTS, BLOCK_ELEMENTS))
    block = torch.empty(in_cache, tensor.shape[1])
    for start in range(0, len(tensor), at_once):
        end = min(start + at_once, len(tensor))
        dtype = torch.int8 if whole else torch.float8_e4m3fn
        result = torch.empty(end - start, tensor.shape[1], dtype=dtype)
        for place in range(start, end, in_cache):
            stop = min(place + in_cache, end)
            values = block[: stop - place].copy_(tensor[place:stop])
            if divisors is not None:
                values.div_(divisors)
            values.div_(of_rows[place:stop]).clamp_(-limit, limit)
            result[place - start : stop - start] = values.round_() if whole else values
        flat = result.reshape(-1)
        yield flat.numpy() if whole else flat.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
