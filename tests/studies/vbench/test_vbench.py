"""The gate by VBench renders what it judges, asks for what it needs, and judges with VBench's own code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.recipe import read_recipe
from studies.vbench.__main__ import Scores, _verdict, app
from studies.vbench.models import DIMENSIONS, MODELS, entries

REAL = Path(sys.prefix).with_name(".venv-vbench")
SMALL = ["--size", "32x32", "--frames", "5", "--steps", "2"]
# three entries as VBench 0.1.5 has them, and one of a dimension that the benchmark leaves out
ENTRIES = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a person swimming in ocean",
        "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
    },
    {
        "prompt_en": "alley",
        "dimension": ["scene", "background_consistency"],
        "auxiliary_info": {"scene": {"scene": {"scene": "alley"}}},
    },
    {
        "prompt_en": "Gwen Stacy reading a book, oil painting",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}},
    },
]


@pytest.fixture
def environment(tmp_path) -> Path:
    """An environment with VBench's list of prompts and a Python, but without its code."""
    package = tmp_path / "env/lib/python3.11/site-packages/vbench"
    package.mkdir(parents=True)
    (package / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "env/bin").mkdir()
    (tmp_path / "env/bin/python").symlink_to(sys.executable)
    return tmp_path / "env"


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments])
    return left.value.code


def line(capsys) -> str:
    (found,) = capsys.readouterr().err.strip().splitlines()
    return found.removeprefix("python -m studies.vbench: ")


def test_missing_environment_and_networks_are_named_before_any_work(tmp_path, tiny_engines, environment, capsys):
    videos = tmp_path / "videos"
    assert status(videos, "--engines", tiny_engines, "--environment", tmp_path / "none") == 2
    assert line(capsys).endswith("none | expected the environment of VBench | run make vbench")
    options = ["--engines", tiny_engines, "--environment", environment, "--models", tmp_path / "models"]
    assert status(videos, *options, "--dimension", "dynamic_degree") == 2
    assert "lacks raft_model/models/raft-things.pth | expected the networks of VBench | " in line(capsys)
    assert not videos.exists()


def test_every_network_is_listed_with_its_source_and_every_prompt_of_the_dimensions(environment, capsys):
    assert {name for model in MODELS for name in model.dimensions} == set(DIMENSIONS)
    assert status("x", "--environment", environment, "--list-models") == 0
    assert [row.split("  ")[0] for row in capsys.readouterr().out.splitlines()] == [model.path for model in MODELS]
    assert status("x", "--environment", environment, "--list-prompts") == 0
    assert capsys.readouterr().out.splitlines() == [entry["prompt_en"] for entry in ENTRIES[1:]]
    package = environment / "lib/python3.11/site-packages/vbench"
    assert [entry["dimension"] for entry in entries(package, ["scene"])] == [["scene"]]


def test_what_a_folder_lacks_is_rendered_and_videos_of_another_run_are_refused(
    tmp_path, tiny_engines, environment, capsys
):
    videos = tmp_path / "videos"
    options = ["--engines", tiny_engines, "--environment", environment, "--render-only", *SMALL]
    assert status(videos, *options, "--prompts", "1") == 0
    first = (videos / "0000.mp4").stat().st_mtime_ns
    assert status(videos, *options) == 0
    assert [read_recipe(path).prompt for path in sorted(videos.iterdir())] == [e["prompt_en"] for e in ENTRIES[1:]]
    assert (videos / "0000.mp4").stat().st_mtime_ns == first
    capsys.readouterr()
    assert status(videos, *options, "--seed", "1") == 2
    assert "0000.mp4 is of another run | expected a video of these engines" in line(capsys)
    (videos / "0001.mp4").unlink()
    assert status(videos, "--environment", environment, "--render-only") == 2
    assert "lacks 1 of 3 videos, the first of 'alley' | " in line(capsys)


def test_a_failure_of_vbench_is_one_line_and_leaves_no_scores(tmp_path, tiny_engines, environment, capsys):
    models = tmp_path / "models"
    (models / "raft_model/models").mkdir(parents=True)
    (models / "raft_model/models/raft-things.pth").touch()
    scores = tmp_path / "scores.json"
    options = ["--engines", tiny_engines, "--environment", environment, "--models", models, "-o", scores, *SMALL]
    assert status(tmp_path / "videos", *options, "--dimension", "dynamic_degree") == 2
    assert line(capsys).startswith("VBench failed: ModuleNotFoundError: No module named 'vbench' | expected its scores")
    assert not scores.exists()


@pytest.mark.parametrize(
    ("mean", "lacks", "beside", "code", "said"),
    [
        (0.6978, (), None, 0, "passes: at least 69.7752, 99 % of 70.48"),
        (0.6977, (), None, 1, "fails: at least 69.7752"),
        (0.10, ("its fixed latent",), None, 0, "not MLPerf's figure; the videos lack its fixed latent"),
        (0.49, ("its fixed latent",), (49.5, "50.00 of bf16.json"), 1, "fails: at least 49.5000, 99 % of 50.00"),
    ],
)
def test_the_mean_passes_from_99_percent_of_the_reference(capsys, mean, lacks, beside, code, said):
    result = Scores(dict.fromkeys(DIMENSIONS, mean), 248, {}, lacks)
    assert result.mean == pytest.approx(100 * mean)
    assert _verdict(result, beside) == code
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(("options", "found"), [
    (["--dimension", "beauty"], "dimension 'beauty' | expected one of subject_consistency"),
    (["--beside", "nothing.json"], "nothing.json: no scores | expected a JSON file of"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, environment, capsys, options, found):
    assert status(tmp_path, "--environment", environment, "--render-only", *options) == 2
    assert line(capsys).startswith(found)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the environment of VBench: make vbench")
def test_vbench_itself_scores_our_videos(tmp_path, tiny_engines, capsys):
    """Its own optical flow with random weights: the score means nothing, the way to it is the real one."""
    program = (
        "import sys, torch; from easydict import EasyDict; from vbench.third_party.RAFT.core.raft import RAFT;"
        "torch.manual_seed(0); m = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False));"
        "torch.save({'module.' + k: v for k, v in m.state_dict().items()}, sys.argv[1])"
    )
    weights = tmp_path / "models/raft_model/models/raft-things.pth"
    weights.parent.mkdir(parents=True)
    subprocess.run([REAL / "bin/python", "-c", program, weights], check=True)
    options = ["--engines", tiny_engines, "--environment", REAL, "--models", tmp_path / "models", "--device", "cpu"]
    scores = tmp_path / "scores.json"
    sized = ["--size", "128x128", "--frames", "5", "--steps", "2", "--prompts", "2", "--dimension", "dynamic_degree"]
    assert status(tmp_path / "videos", *options, *sized, "-o", scores) == 0
    found = json.loads(scores.read_text())
    assert set(found["scores"]) == {"dynamic_degree"}
    assert 0 <= found["mean"] <= 100
    assert found["videos"] == 2
    assert "its fixed latent" in found["lacks"]
    assert "not MLPerf's figure" in capsys.readouterr().out
