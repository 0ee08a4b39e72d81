"""A real server skips steps and changes LoRAs as a request says, and counts both."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.lora.merge import LoraChoice
from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from tests.triton_repo.serving import SMALL, serving
from triton_repo.client import JobError
from triton_repo.repository import RepositoryOptions, write_repository
from wan22.bundle import open_bundle
from wan22.caching import Caching
from wan22.errors import UserError
from wan22.specs import SPECS
from wan_trt.recipes.weight_sets import make_weight_sets


@pytest.fixture(scope="module")
def sets(tiny_engines, tmp_path_factory):
    folder, dit = tmp_path_factory.mktemp("sets"), SPECS["t2v-a14b-tiny"].dit
    save_file({"diffusion_model.blocks.0.ffn.0.diff": np.full((dit.ffn_width, dit.width), 0.2, np.float32)},
              folder / "ink.safetensors")  # fmt: skip
    return make_weight_sets(tiny_engines, folder / "made", {"ink": (LoraChoice(folder / "ink.safetensors"),)})


@pytest.fixture(scope="module")
def server(installation, tiny_engines, sets, tmp_path_factory):
    with serving(installation, tmp_path_factory.mktemp("served"), {"wan22": tiny_engines}, loras=sets) as served:
        yield served


@pytest.mark.slow
def test_a_served_step_cache_is_that_of_generate(server, tiny_engines, tmp_path):
    caching = Caching(skip_steps=(3, 5), reuse="hold", late_cfg=(9,))
    request = Request("a fox", size=(64, 64), frames=5, steps=12, seed=7, cache=caching)
    before = {name: server.metric(name) for name in ("wan22_cached_steps_total", "wan22_late_cfg_steps_total")}
    with server.client() as client:
        job = client.submit(request)
        events = [event for event in job.events() if event["phase"] == "denoise"]
        served = job.result()
    assert [event["step"] - 1 for event in events if event["cached"]] == [3, 5]
    assert served.event["skipped"] == [3, 5]
    late = served.event["late_cfg"]
    ours = generate(tiny_engines, request, tmp_path / "ours.mp4")
    assert (tmp_path / "ours.mp4").read_bytes() == served.video
    assert ours.timings.late == late
    assert server.metric("wan22_cached_steps_total") == before["wan22_cached_steps_total"] + 2
    assert server.metric("wan22_late_cfg_steps_total") == before["wan22_late_cfg_steps_total"] + len(late)


@pytest.mark.slow
def test_a_served_lora_is_that_of_its_weights(server, tiny_engines, sets, tmp_path):
    video = {"size": (64, 64), "frames": SMALL["num_frames"], "steps": 3, "seed": 7}
    bundles = {"ink": open_bundle(sets["ink"], "engines")}
    before = server.metric("wan22_lora_swaps_total")
    with server.client() as client, Pipeline(open_bundle(tiny_engines, "engines"), weight_sets=bundles) as pipeline:
        videos = {}
        for lora in ("ink", None):
            request = Request("a fox", **video, lora=lora)
            job = client.submit(request)
            videos[lora] = job.result()
            assert videos[lora].event.get("lora") == lora
            generate(pipeline, request, tmp_path / "ours.mp4")
            assert (tmp_path / "ours.mp4").read_bytes() == videos[lora].video
        assert videos["ink"].video != videos[None].video
        with pytest.raises(JobError, match=r"lora 'oil' \| expected one of ink"):
            client.submit(Request("a fox", **video, lora="oil")).result()
    assert server.metric("wan22_lora_swaps_total") == before + 2


def test_backends_of_triton_take_no_weight_sets(tiny_engines, sets, tmp_path):
    options = RepositoryOptions(topology="bls", loras=sets)
    with pytest.raises(UserError, match="--lora in topology bls"):
        write_repository(tiny_engines, tmp_path / "repository", options)
    assert not (tmp_path / "repository").exists()
