"""A served model that computes NaN: refused while it warms up where that shows it, named in the answer where not."""

import pytest

from tests.triton_repo.serving import SMALL, serving
from triton_repo.client import JobError
from triton_repo.loading import warm_up
from triton_repo.served_pipeline import ServedPipeline
from wan22.bundle import open_bundle
from wan22.errors import NonFiniteError


@pytest.mark.parametrize(
    ("component", "named"),
    [("text_encoder", "embeddings of the prompt"), ("vae_decoder", "decoded frames")],
)
def test_warming_up_finds_it(tiny_engines, with_nan, component, named):
    bundle = open_bundle(with_nan(tiny_engines, component), "engines")
    with ServedPipeline(bundle) as pipeline, pytest.raises(NonFiniteError, match=named):
        warm_up(pipeline)


def test_a_job_that_meets_it_is_told_where(installation, tiny_engines, with_nan, tmp_path):
    broken = with_nan(tiny_engines, "low_noise")  # the one step of warming up is made by the other expert
    with serving(installation, tmp_path, {"wan22": broken}) as server, server.client() as client:
        with pytest.raises(JobError, match=r"velocity of low_noise in step 3 of 3 \(t = ") as failed:
            client.generate("x", **SMALL)
        assert failed.value.status == "INTERNAL"
        assert server.metric("wan22_requests_total", outcome="failed") == 1
