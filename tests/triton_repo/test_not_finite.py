"""A served model that computes NaN: refused while it warms up, and where it cannot warm up, named in the answer."""

import pytest

from tests.triton_repo.serving import SMALL, serving
from triton_repo.client_errors import JobError
from triton_repo.loading import warm_up
from triton_repo.probe import MAX_FAILURES
from triton_repo.served_pipeline import ServedPipeline
from wan22.bundle import open_bundle
from wan22.errors import NonFiniteError, UserError


@pytest.mark.parametrize(
    ("model", "component", "named"),
    [
        ("t2v-a14b-tiny", "text_encoder", "embeddings of the prompt"),
        ("t2v-a14b-tiny", "high_noise", "velocity of high_noise in step 1 of 2"),
        ("t2v-a14b-tiny", "low_noise", "velocity of low_noise in step 2 of 2"),
        ("t2v-a14b-tiny", "vae_decoder", "decoded frames"),
        ("i2v-a14b-tiny", "vae_encoder", "encoded image"),
        ("ti2v-5b-tiny", "vae_encoder", "encoded image"),
    ],
)
def test_warming_up_runs_every_engine(flow_of, with_nan, model, component, named):
    bundle = open_bundle(with_nan(flow_of(model).engines, component), "engines")
    with ServedPipeline(bundle) as pipeline, pytest.raises(NonFiniteError, match=named):
        warm_up(pipeline)


@pytest.mark.parametrize("model", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_warming_up_spends_time_in_every_engine(flow_of, model):
    with ServedPipeline(open_bundle(flow_of(model).engines, "engines")) as pipeline:
        warm_up(pipeline)
        assert set(pipeline.seconds) == set(pipeline.spec.components)


def test_jobs_that_meet_it_are_told_where_and_too_many_in_a_row_end_the_server(
    installation, tiny_engines, with_nan, tmp_path
):
    broken = with_nan(tiny_engines, "low_noise")
    with serving(installation, tmp_path, {"wan22": broken}, "bls") as server, server.client() as client:
        for count in range(1, MAX_FAILURES + 1):
            with pytest.raises(JobError, match=r"velocity of low_noise in step 3 of 3 \(t = ") as failed:
                client.generate("x", **SMALL)
            assert failed.value.status == "INTERNAL"
            assert server.metric("wan22_requests_total", outcome="failed") == count
            assert server.metric("wan22_failures_in_a_row") == count
        with pytest.raises(UserError, match=f"the last {MAX_FAILURES} jobs failed; server stopped"):
            server.server.watch()
        assert not server.is_ready()
