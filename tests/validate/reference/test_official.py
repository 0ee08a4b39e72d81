"""The official code as a second reference: isolated from ours and, where it is there, in agreement with both sides.

``make test`` installs it. WAN22_OFFICIAL_REPO may name a clone instead.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.checkpoint.checkpoint import open_checkpoint
from runtime.request import Request
from validate import ValidateOptions, official_wheel, validate
from validate.reference.official import Official, version_of
from validate.reference.official_modules import FILES, PIPELINES, SOLVERS
from validate.report.conditions import second_reference
from wan22.errors import UserError
from wan22.specs import SPECS

CLONE = os.environ.get("WAN22_OFFICIAL_REPO", "")
WHEEL = Path(sys.prefix).with_name(".venv-official")
needs_code = pytest.mark.skipif(not CLONE and not WHEEL.exists(), reason="no official code: make official")
SMALL = ValidateOptions(Request(size=(64, 64), frames=5, steps=4))


def with_code(**request):
    repo = Path(CLONE) if CLONE else official_wheel()
    return replace(SMALL, request=replace(SMALL.request, **request), official_repo=repo)


TOKENIZERS = """
import torch
from wan.modules import t5  # a sibling, reached without the package's __init__

class HuggingfaceTokenizer:
    def __init__(self, name, seq_len, clean):
        torch.nn.functional.made_up = True  # such code may patch shared modules

    def __call__(self, texts, return_mask, add_special_tokens):
        ids = torch.tensor([[len(texts[0]), 7, 0, 0]])
        return ids, ids.gt(0)
"""


@pytest.fixture
def clone(tmp_path):
    """A package of the official shape, whose ``__init__`` files must never run."""
    pipelines = (file for file, _ in PIPELINES.values())
    for file in (*FILES, *SOLVERS, *pipelines, "__init__.py", "modules/__init__.py", "utils/__init__.py"):
        path = tmp_path / "wan" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('not to be run')" if path.name == "__init__.py" else "")
    (tmp_path / "wan/modules/tokenizers.py").write_text(TOKENIZERS)
    return tmp_path


def test_the_official_code_runs_isolated_from_ours(clone, tiny_checkpoint):
    import torch

    with Official(clone, open_checkpoint(tiny_checkpoint)) as official:
        assert official.token_ids("four").tolist() == [[4, 7]]
    assert not [name for name in sys.modules if name == "wan" or name.startswith("wan.")]
    assert not hasattr(torch.nn.functional, "made_up")


def test_a_package_that_the_code_lacks_is_named(clone, tiny_checkpoint):
    (clone / "wan/modules/vae2_1.py").write_text("import einopsen")
    with pytest.raises(UserError, match=r"No module named 'einopsen' .* pip install"):
        Official(clone, open_checkpoint(tiny_checkpoint)).__enter__()


def test_a_folder_that_is_not_a_clone_is_refused_before_any_work(tiny_engines, tiny_checkpoint, tmp_path):
    (tmp_path / "repo").mkdir()
    with pytest.raises(UserError, match=r"no wan/modules/model.py .* git clone"):
        validate(tiny_engines, tiny_checkpoint, tmp_path / "out", replace(SMALL, official_repo=tmp_path / "repo"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("solver", "schedule"), [("euler", "official"), ("unipc", "diffusers")])
def test_a_run_that_the_code_does_not_support_is_reported(clone, solver, schedule):
    request = Request("x", solver=solver, schedule=schedule, size=(32, 32), frames=1).completed(SPECS["t2v-a14b-tiny"])
    (message,) = second_reference(ValidateOptions(official_repo=clone), request)
    assert message == (
        "second reference",
        f"the code at {clone}, fp32 on the CPU; it has no {solver} with the {schedule} schedule, so its run is not "
        "compared",
    )


def test_a_process_that_dies_is_reported_in_one_line(clone, tiny_checkpoint):
    (clone / "wan/modules/tokenizers.py").write_text("import os\nHuggingfaceTokenizer = lambda *_, **__: os._exit(9)")
    with Official(clone, open_checkpoint(tiny_checkpoint)) as official, pytest.raises(UserError, match="was killed"):
        official.token_ids("four")


RUNS = [
    ("t2v-a14b-tiny", {"steps": 5, "shift": 7.3}),
    ("i2v-a14b-tiny", {"steps": 3, "shift": 3.1, "size": (96, 64), "frames": 9}),
    ("ti2v-5b-tiny", {"steps": 7, "shift": 1.7, "size": (64, 96), "solver": "dpm++"}),
]


@needs_code
@pytest.mark.slow
@pytest.mark.parametrize(("model", "request_"), RUNS, ids=[model for model, _ in RUNS])
def test_engines_match_the_official_code(flow_of, tmp_path, model, request_):
    flow = flow_of(model)
    found = validate(flow.engines, flow.checkpoint, tmp_path, with_code(**request_))
    rows = [row for row in found.rows if row.subject.startswith("official_")]
    assert [row.name for row in found.failed] == []
    assert {row.component for row in rows} >= {"tokenizer", "text_encoder", "sampler", "vae_decoder_next", "video"}
    assert {row.subject for row in rows} >= {"official_velocity", "official_latents", "official_frames"}
    assert [row.component for row in rows if row.subject == "official_latents"] == [
        row.component for row in found.steps
    ]
    names = [row.name for row in found.rows]
    assert len([name for name in names if name.startswith("official ")]) == len(rows)
    assert "official pipeline's frames" in names
    assert not {row.name for row in rows} & {row.name for row in found.rows if row not in rows}


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_version_of_a_wheel_and_of_a_clone_and_of_no_other(tmp_path):
    git(tmp_path, "init")
    assert version_of(tmp_path) == ""  # nothing is committed yet
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    assert len(version_of(tmp_path)) == len("commit ") + 12
    (tmp_path / "unpacked").mkdir()
    assert version_of(tmp_path / "unpacked") == ""  # the enclosing repository is another one
    (tmp_path / "unpacked/wan22-2.2.11.dist-info").mkdir()
    assert version_of(tmp_path / "unpacked") == "wan22 2.2.11"


def test_the_wheel_is_looked_for_beside_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(UserError, match=r"no package wan in .*\.venv-official .* make official"):
        official_wheel()
    packages = tmp_path / ".venv-official/lib/python3.11/site-packages"
    (packages / "wan").mkdir(parents=True)
    assert official_wheel() == packages
