"""Copy a bundle so that it shares no files with other folders and can be moved to another file system."""

import shutil
from pathlib import Path

from runtime.built_for import check_plans
from runtime.signature import SIGNATURE
from wan22.bundle import MANIFEST, Bundle, kind_of, open_bundle, refuse_existing, staged
from wan22.onnx_file import check_graphs
from wan22.outputs import check_disk, check_no_source
from wan22.progress import Progress, silent


def pack(bundle: Path, folder: Path, *, overwrite: bool = False, progress: Progress = silent) -> Bundle:
    """Check the bundle at ``bundle`` completely and copy it to ``folder``, with builders' logs.

    Raises:
        UserError: there is no bundle, a file or plan differs from the manifest, or ``folder`` is not writable.
    """
    kind = kind_of(bundle)
    refuse_existing(folder, kind, overwrite=overwrite)
    check_no_source(folder, bundle)
    source = open_bundle(bundle, kind, full_check=True)
    check_graphs(source)
    check_plans(source)
    files = [bundle / path for path in (MANIFEST, *source.manifest.files())]
    others = [*bundle.rglob("*.log"), bundle / SIGNATURE]  # the manifest lists neither builders' logs nor the signature
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
