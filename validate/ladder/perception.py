"""LPIPS, the perceptual distance of Zhang et al. (2018), where its package is installed; nothing else needs it."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from validate.reference.parts import F32

PACKAGE = "lpips"
SMALLEST_SIDE = 31  # pixels that the smaller side must have for AlexNet's layers


@cache
def why_no_lpips() -> str:
    """Empty where it can be measured."""
    if find_spec(PACKAGE) is None:
        return f"not measured: package {PACKAGE} is not installed"
    try:
        _network()
    except Exception as error:  # no network, another torchvision: the rest of the report does not need it
        return f"not measured: the network of package {PACKAGE} cannot be loaded ({' '.join(str(error).split())})"
    return ""


@cache
def _network() -> Any:
    """AlexNet with the published weights, which the package fetches on first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how the package asks it for the weights
        return import_module(PACKAGE).LPIPS(net="alex", verbose=False).eval()


def lpips_per_frame(ours: F32, reference: F32) -> list[float]:
    """Of every frame of two videos ``[1, 3, F, H, W]`` in [-1, 1]."""
    import torch

    with torch.inference_mode():
        return [
            float(_network()(*(torch.from_numpy(side[:, :, i].clip(-1, 1)) for side in (ours, reference))))
            for i in range(ours.shape[2])
        ]
