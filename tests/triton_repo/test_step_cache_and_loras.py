"""A real server skips steps and changes LoRAs as a request says, and counts both."""

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.lora.merge import LoraChoice
from runtime.block_backend import BlockOptions
from runtime.request import Request
from tests.triton_repo.serving import SMALL, serving
from triton_repo.client import JobError
from triton_repo.repository import RepositoryOptions, write_repository
from wan22.block_layout import read_block_layout
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
def server(installation, tiny_engines, blocks_of, sets, tmp_path_factory):
    models = {"wan22": tiny_engines, "wan22_blocks": blocks_of("t2v-a14b-tiny")}
    options = {"wan22": {"loras": sets}, "wan22_blocks": {"blocks": BlockOptions("disk")}}
    with serving(installation, tmp_path_factory.mktemp("served"), models, options=options) as served:
        yield served


SCRIPT = """
import json, sys
from pathlib import Path
from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.weight_sets import WeightSets
from wan22.bundle import open_bundle
from wan22.caching import Caching
engines, sets, output, cases = json.load(sys.stdin)
bundles = {name: open_bundle(Path(folder), "engines") for name, folder in sets.items()}
with Pipeline.open(Path(engines)) as pipeline:
    pipeline.weight_sets = WeightSets(pipeline.bundle, bundles)
    for number, (steps, caching, lora) in enumerate(cases):
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in (caching or {}).items()}
        cache = Caching(**lists) if caching else None
        request = Request("a fox", size=(64, 64), frames=5, steps=steps, seed=7, cache=cache, lora=lora)
        generate(pipeline, request, Path(output) / f"{number}.mp4")
"""
CACHE = {"skip_steps": (3, 5), "reuse": "hold", "late_cfg": (7,)}
CASES = ((12, CACHE, None), (3, None, "ink"), (3, None, None))


@pytest.fixture(scope="module")
def generated(installation, tiny_engines, sets, tmp_path_factory):
    """The videos of CASES, made by the Python that the server's models run in, whose numpy is another."""
    if installation.environment is None:
        pytest.skip("the server's models run in a Python of their own")
    folder = tmp_path_factory.mktemp("generated")
    given = json.dumps((str(tiny_engines), {name: str(its) for name, its in sets.items()}, str(folder), CASES))
    subprocess.run([installation.environment / "bin" / "python3", "-c", SCRIPT], input=given, text=True, check=True)
    return [(folder / f"{number}.mp4").read_bytes() for number in range(len(CASES))]


def request_of(case):
    steps, caching, lora = CASES[case]
    cache = Caching(**caching) if caching else None
    return Request("a fox", size=(64, 64), frames=5, steps=steps, seed=7, cache=cache, lora=lora)


@pytest.mark.slow
def test_a_served_step_cache_is_that_of_generate(server, generated):
    before = {name: server.metric(name) for name in ("wan22_cached_steps_total", "wan22_late_cfg_steps_total")}
    with server.client() as client:
        job = client.submit(request_of(0))
        events = [event for event in job.events() if event["phase"] == "denoise"]
        served = job.result()
    assert [event["step"] - 1 for event in events if event["cached"]] == [3, 5]
    assert (served.event["skipped"], served.event["late_cfg"]) == ([3, 5], [7])
    assert served.video == generated[0]
    assert server.metric("wan22_cached_steps_total") == before["wan22_cached_steps_total"] + 2
    assert server.metric("wan22_late_cfg_steps_total") == before["wan22_late_cfg_steps_total"] + 1


@pytest.mark.slow
def test_a_served_lora_is_that_of_its_weights(server, generated):
    before = server.metric("wan22_lora_swaps_total")
    with server.client() as client:
        styled, plain = (client.submit(request_of(case)).result() for case in (1, 2))
        with pytest.raises(JobError, match=r"lora 'oil' \| expected one of ink"):
            client.generate("a fox", lora="oil", **SMALL)
    assert (styled.event["lora"], plain.event.get("lora")) == ("ink", None)
    assert (styled.video, plain.video) == (generated[1], generated[2])
    assert styled.event["latents_sha256"] != plain.event["latents_sha256"]
    assert server.metric("wan22_lora_swaps_total") == before + 2


def test_backends_of_triton_take_no_weight_sets(tiny_engines, sets, tmp_path):
    options = RepositoryOptions(topology="bls", loras=sets)
    with pytest.raises(UserError, match="--lora in topology bls"):
        write_repository(tiny_engines, tmp_path / "repository", options)
    assert not (tmp_path / "repository").exists()


@pytest.mark.slow
def test_blocks_stream_from_disk_in_a_server_and_their_copies_are_counted(server, blocks_of):
    names = [f"wan22_{name}_total" for name in
             ("streamed_bytes", "streamed_seconds", "stream_stall_seconds", "expert_switch_stall_seconds")]  # fmt: skip
    before = [server.metric(name, "wan22_blocks") for name in names]
    with server.client("wan22_blocks") as client:
        result = client.submit(request_of(2)).result()
    size, *seconds = (server.metric(name, "wan22_blocks") - then for name, then in zip(names, before, strict=True))
    bundle = open_bundle(blocks_of("t2v-a14b-tiny"), "engines")
    layout = read_block_layout(bundle.path(bundle.component("high_noise").weights[0]))
    assert size == 2 * layout.blocks * layout.step_bytes  # the last job left the other expert's blocks
    assert all(value > 0 for value in seconds)
    assert seconds[2] <= seconds[1] <= seconds[0] + 0.1
    assert result.video
