"""A copy of a bundle that shares nothing with other folders, and so may leave its file system."""

import shutil
from pathlib import Path

from runtime.built_for import check_plans
from runtime.signature import SIGNATURE
from wan22.bundle import MANIFEST, Bundle, check_disk, kind_of, open_bundle, refuse_existing, staged
from wan22.onnx_file import check_graphs
from wan22.progress import Progress, silent


def pack(bundle: Path, folder: Path, *, overwrite: bool = False, progress: Progress = silent) -> Bundle:
    """Checks the bundle at ``bundle`` completely and copies it to ``folder``, builders' logs too.

    Raises:
        UserError: no bundle, a file or plan that is not what the manifest says, a place that cannot be written.
    """
    kind = kind_of(bundle)
    refuse_existing(folder, kind, overwrite=overwrite)
    source = open_bundle(bundle, kind, full_check=True)
    check_graphs(source)
    check_plans(source)
    files = [bundle / path for path in (MANIFEST, *source.manifest.files())]
    others = [*bundle.rglob("*.log"), bundle / SIGNATURE]  # builders' logs and the signature are in no manifest
    files += [path for path in others if path.is_file() and not path.is_symlink()]
    total, done = sum(file.stat().st_size for file in files), 0
    check_disk(folder, total)
    with staged(folder, overwrite=overwrite) as temporary:
        for file in files:
            target = temporary / file.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            done += file.stat().st_size
            progress("copy", done, total, "bytes")
    return Bundle(folder, source.manifest)
