"""Engine bundle → Triton model repository.

The repository holds configuration and three-line models; engines, weights and tokenizer stay where they are and are
pinned by the hash of the bundle's manifest, so that nothing in the repository can be exchanged for a plan.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from triton_repo.config import as_text, owner_config
from triton_repo.settings import Limits, Settings, check_name, settings_of
from wan22.bundle import Bundle, open_bundle, staged
from wan22.errors import UserError

MARK = ".made-by-wan-trt-triton"
VERSION = "1"


@dataclass(frozen=True)
class RepositoryOptions:
    name: str = "wan22"
    limits: Mapping[str, int | None] = field(default_factory=dict)  # by name; the model's where there is none
    engines_at: str = ""  # where the engines are on the serving machine, if not where they are here
    keep_experts: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Written:
    bundle: Bundle
    limits: Limits


def write_repository(engines: Path, folder: Path, options: RepositoryOptions | None = None) -> Written:
    """Writes the repository ``folder`` for the engine bundle at ``engines``, which is checked in full.

    Raises:
        UserError: no such bundle or a broken one, a name that will not do, a folder that is there already.
    """
    options = options or RepositoryOptions()
    check_name(options.name)
    bundle = open_bundle(engines, "engines", full_check=True)
    limits = Limits.of(bundle.manifest.spec, **options.limits)
    _make_room(folder, overwrite=options.overwrite)
    with staged(folder) as temporary:
        (temporary / MARK).touch()
        settings = settings_of(
            bundle,
            limits,
            engines_at=options.engines_at,
            keep_experts=options.keep_experts,
        )
        write_owner(temporary, options.name, settings, on_gpu=is_for_gpu(bundle))
    return Written(bundle, limits)


def write_owner(repository: Path, name: str, settings: Settings, *, on_gpu: bool) -> None:
    write_model(repository, name, as_text(owner_config(name, settings, on_gpu=on_gpu)), "owner.py")


def write_model(repository: Path, name: str, config: str, template: str) -> None:
    """One model of the repository: its configuration and the code of its only version."""
    version = repository / name / VERSION
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    code = resources.files("triton_repo").joinpath("templates", template)
    (version / "model.py").write_text(code.read_text())


def is_for_gpu(bundle: Bundle) -> bool:
    build = bundle.manifest.build
    return build is not None and build.target != "cpu"


def _make_room(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} exists", "a new folder", "choose another or add --overwrite")
    if not (folder / MARK).is_file():
        raise UserError(f"{folder} is no repository of ours", "one made by wan-trt triton", "choose another folder")
    shutil.rmtree(folder)
