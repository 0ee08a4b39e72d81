"""The environment and the network weights that VBench needs, neither of which this project ships."""

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan22.errors import UserError, some_of

DIMENSIONS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "appearance_style", "scene",
)  # fmt: skip
FULL_INFO = "VBench_full_info.json"


@dataclass(frozen=True)
class Model:
    """A file or folder below the folder of models, for some dimensions."""

    path: str
    source: str
    dimensions: tuple[str, ...]


# where VBench 0.1.5 looks, and what it would download from there
MODELS = (
    Model("dino_model/facebookresearch_dino_main/hubconf.py",
        "git clone https://github.com/facebookresearch/dino", ("subject_consistency",)),
    Model("dino_model/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        ("subject_consistency",)),
    Model("clip_model/ViT-B-32.pt",
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        ("background_consistency", "appearance_style")),
    Model("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", ("motion_smoothness",)),
    Model("raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip", ("dynamic_degree",)),
    Model("caption_model/tag2text_swin_14m.pth",
        "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth", ("scene",)),
    Model("huggingface/hub/models--bert-base-uncased",
        "HF_HOME=MODELS/huggingface huggingface-cli download bert-base-uncased", ("scene",)),
)  # fmt: skip


def usual_environment() -> Path:
    """Where ``make vbench`` puts it: beside the environment that runs."""
    return Path(sys.prefix).with_name(".venv-vbench")


def package_in(environment: Path) -> Path:
    """The folder of the package vbench in ``environment``.

    Raises:
        UserError: it is not there.
    """
    found = sorted(environment.glob("lib/python*/site-packages/vbench"))
    if not found or not (found[-1] / FULL_INFO).is_file():
        raise UserError(f"no package vbench in {environment}", "the environment of VBench", "run make vbench")
    return found[-1]


def entries(package: Path, dimensions: Collection[str]) -> list[dict[str, Any]]:
    """VBench's own entries, in its order, of the prompts that it judges in any of ``dimensions``; 248 for all six."""
    content: list[dict[str, Any]] = json.loads((package / FULL_INFO).read_text(encoding="utf-8"))
    kept = [entry | {"dimension": [name for name in entry["dimension"] if name in dimensions]} for entry in content]
    return [entry for entry in kept if entry["dimension"]]


def check_models(folder: Path, dimensions: Sequence[str]) -> None:
    """Require everything that ``dimensions`` load, so that VBench downloads nothing.

    Raises:
        UserError: names what is missing.
    """
    missing = [m.path for m in MODELS if set(m.dimensions) & set(dimensions) and not (folder / m.path).exists()]
    if missing:
        remedy = "fetch what --list-models shows, choose --dimension, or render alone with --render-only"
        raise UserError(f"{folder} lacks {some_of(missing, 8)}", "the networks of VBench", remedy)
