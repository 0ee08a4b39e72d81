"""The reference's convolutions are quicker inside the block, and the same."""

import pytest
import torch
from torch.nn import functional

from validate.ladder.metrics import compare
from validate.reference.convolution import OneDnnConvolutions

SMALL = torch.randn(1, 16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
KERNEL = torch.randn(24, 16, 3, 3, 3, generator=torch.Generator().manual_seed(1)) / 20
BIAS = torch.linspace(-1, 1, 24)


def kernels_of(function):
    """Names of the operators that ``function`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": (2, 1, 1), "padding": (0, 1, 1)}])
def test_the_values_stay(options):
    expected = functional.conv3d(SMALL.double(), KERNEL.double(), BIAS.double(), **options)
    layer = torch.nn.Conv3d(16, 24, 3, **options)
    layer.load_state_dict({"weight": KERNEL, "bias": BIAS})
    with OneDnnConvolutions(), torch.inference_mode():
        found = layer(SMALL)
    assert compare(found, expected).relative_l2 < 1e-6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_small_ones_no_longer_take_the_slow_kernel():
    layer = torch.nn.Conv3d(16, 24, 3).requires_grad_(False)
    assert "aten::slow_conv3d_forward" in kernels_of(lambda: layer(SMALL))
    with OneDnnConvolutions():
        assert not {"aten::slow_conv3d_forward"} & kernels_of(lambda: layer(SMALL))


def test_other_types_are_left_alone():
    with OneDnnConvolutions():
        found = functional.conv3d(SMALL.double(), KERNEL.double())
    assert torch.equal(found, functional.conv3d(SMALL.double(), KERNEL.double()))
