"""``polygraphy run`` reads the files of ``--calls``, runs the graph and compares."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.request import Request
from validate.ladder.onnx_side import open_for_comparison
from validate.ladder.polygraphy_files import check_calls, write_call
from wan22.errors import UserError

POLYGRAPHY = Path(sys.executable).with_name("polygraphy")


@pytest.fixture(scope="module")
def calls(tmp_path_factory, tiny_engines):
    folder = tmp_path_factory.mktemp("calls")
    with open_for_comparison(tiny_engines, folder) as pipeline:
        request = Request("a fox", size=(64, 64), frames=5, steps=2, shift=1).completed(pipeline.spec)
        *_, last = pipeline.denoise(request)
        for _ in pipeline.decode(last.latents):
            pass
    return folder


def polygraphy_run(graph, folder):
    inputs, outputs = (folder / f"{graph.stem}.{leaf}.json" for leaf in ("inputs", "outputs"))
    command = ["run", graph, "--onnxrt", "--load-inputs", inputs, "--load-outputs", outputs, "--atol", "1e-4"]
    return subprocess.run([POLYGRAPHY, *command], check=False, capture_output=True, text=True, timeout=120)


def test_every_engine_that_was_called_has_its_files(calls, tiny_engines):
    names = ("text_encoder", "high_noise", "low_noise", "vae_decoder_first", "vae_decoder_next")
    expected = {f"{name}.{leaf}.json" for name in names for leaf in ("inputs", "outputs")}
    assert {path.name for path in calls.iterdir()} == expected


def test_state_is_recorded_before_the_call_overwrites_it(calls):
    """The call itself overwrites it."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    (given,) = load_json(str(calls / "vae_decoder_next.inputs.json"))
    made = RunResults.load(str(calls / "vae_decoder_first.outputs.json"))["wan-trt"][0]
    assert all(np.array_equal(given[name], made[f"next_{name}"]) for name in given if name.startswith("cache_"))


def test_polygraphy_runs_the_graph_on_them_and_agrees(calls, tiny_bundle):
    result = polygraphy_run(tiny_bundle / "low_noise.onnx", calls)
    assert result.returncode == 0, result.stdout + result.stderr


def test_polygraphy_finds_another_answer(calls, tiny_bundle, tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    (inputs,) = load_json(str(calls / "low_noise.inputs.json"))
    answers = RunResults.load(str(calls / "low_noise.outputs.json"))["wan-trt"][0]
    write_call(tmp_path, "low_noise", inputs, {"velocity": np.asarray(answers["velocity"]) + 1})
    result = polygraphy_run(tiny_bundle / "low_noise.onnx", tmp_path)
    assert result.returncode == 1
    assert "FAILED" in result.stdout + result.stderr


def test_an_impossible_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write calls"):
        check_calls(tmp_path / "file")
