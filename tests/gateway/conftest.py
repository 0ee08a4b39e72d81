import numpy as np
import pytest

from tests.gateway.running import gateway_in_front
from tests.triton_repo.serving import serving


@pytest.fixture(scope="session")
def triton(installation, tiny_engines, tmp_path_factory):
    """A server of the tiny T2V model that tests share."""
    with serving(installation, tmp_path_factory.mktemp("triton"), {"wan22": tiny_engines}) as server:
        yield server


@pytest.fixture(scope="session")
def gateway(triton, tmp_path_factory):
    """A gateway that tests share; each looks only at its own videos."""
    pytest.importorskip("openai")
    data = tmp_path_factory.mktemp("gateway") / "data"
    latents = data.parent / "fixed.npy"
    np.save(latents, np.random.default_rng(1).standard_normal((1, 16, 2, 8, 8), np.float32))
    options = ["--finish-within", 0, "--queue-size", 10, "--latent", f"fixed={latents}", "--tell-paths"]
    with gateway_in_front(data, [triton.url], *options) as running:
        yield running
