"""The location of a checkpoint: a folder or a hub name, single files for some or all of its parts, or both.

Manifests store it as one string: ``FOLDER``, ``owner/name@revision``, ``FOLDER,vae=FILE`` or
``high_noise=FILE,low_noise=FILE,text_encoder=FILE,vae=FILE,tokenizer=FOLDER``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wan22.errors import UserError

PARTS = ("high_noise", "low_noise", "dit", "text_encoder", "vae", "tokenizer")
_SPLIT = re.compile(rf",?(?:^|(?<=,))({'|'.join(PARTS)})=")


@dataclass(frozen=True)
class Place:
    whole: str = ""  # folder or hub name
    files: Mapping[str, Path] = field(default_factory=dict)  # by part

    @classmethod
    def parse(cls, where: str | Path) -> "Place":
        """Parse the string form. Raises UserError if a part is named twice."""
        try:
            if Path(where).exists():
                return cls(str(where))
        except OSError:  # several file names may exceed the length of a path
            pass
        whole, *rest = _SPLIT.split(str(where))
        parts, files = rest[::2], rest[1::2]
        if len(set(parts)) < len(parts):
            raise UserError(f"checkpoint {where}", "every part once", "name one file for each part")
        return cls(whole.rstrip(","), {part: Path(file.rstrip(",")) for part, file in zip(parts, files, strict=True)})

    @property
    def paths(self) -> tuple[Path, ...]:
        return (*([Path(self.whole)] if self.whole else []), *self.files.values())

    def __str__(self) -> str:
        return ",".join(
            [*([self.whole] if self.whole else []), *(f"{part}={file}" for part, file in self.files.items())]
        )


def listing(folder: Path, depth: int = 3) -> frozenset[str]:
    """The relative names of the files and folders ("vae/") in ``folder``, without hidden ones, down to ``depth``."""
    found: set[str] = set()
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir() and depth:
            found |= {f"{path.name}/{name}" for name in listing(path, depth - 1)} | {f"{path.name}/"}
        else:
            found.add(path.name)
    return frozenset(found)


def real_folder(folder: Path) -> Path:
    """The snapshot in a ``models--owner--name`` folder of the hub's cache, else ``folder`` itself."""
    reference = folder / "refs" / "main"
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    snapshots = sorted((folder / "snapshots").iterdir())
    if reference.is_file() and (folder / "snapshots" / reference.read_text().strip()) in snapshots:
        return folder / "snapshots" / reference.read_text().strip()
    if len(snapshots) != 1:
        raise UserError(f"{folder} holds {len(snapshots)} snapshots", "one, or refs/main", "name one of snapshots/")
    return snapshots[0]
