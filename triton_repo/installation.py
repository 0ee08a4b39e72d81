"""Find a ``tritonserver`` on this machine, and prepare its backends and environment.

It may be at the path of NVIDIA's container, on ``PATH``, or in the wheel ``nvidia-pytriton``. The wheel's binary is an
old release with only the Python backend, suitable for laptops and CI on loopback. The wheel stores one stub per Python
version apart from the backend, so links assemble the backend folder.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wan22.errors import UserError
from wan22.files import scratch_folder

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
WHEEL = Path("lib", "python*", "site-packages", "pytriton", "tritonserver")


@dataclass(frozen=True)
class Installation:
    """A ``tritonserver`` with its Python backend."""

    binary: Path
    stub: Path | None = None  # only if it is apart from the backend, as in the wheel
    environment: Path | None = None  # the virtual environment whose packages the models import

    @property
    def backends(self) -> Path:
        return self.binary.parent.parent / "backends"


def find_installation(environments: Sequence[Path], binary: Path | None = None) -> Installation:
    """The first of: ``binary``, the container's, the one on ``PATH``, a wheel in one of ``environments``.

    Raises:
        UserError: none of them exists.
    """
    on_path = shutil.which("tritonserver", path=_absolute_folders(os.environ.get("PATH", os.defpath)))
    for candidate in (binary, CONTAINER_BINARY, Path(on_path) if on_path else None):
        if candidate is not None and candidate.is_file():
            return Installation(candidate.resolve())
        if candidate is not None and candidate is binary:
            raise UserError(f"no tritonserver at {binary}", "an executable", "name another, or leave --server out")
    for environment in environments:
        for folder in sorted(environment.glob(str(WHEEL))):
            return _from_wheel(environment, folder)
    expected = "a Triton container, one on PATH, or the nvidia-pytriton wheel"
    raise UserError("no tritonserver", expected, "run make triton")


def _absolute_folders(path: str) -> str:
    """``path`` without relative folders, such as the working folder, where others may have put programs."""
    return os.pathsep.join(folder for folder in path.split(os.pathsep) if Path(folder).is_absolute())


def _from_wheel(environment: Path, folder: Path) -> Installation:
    version = folder.parents[2].name.removeprefix("python")
    stub = folder / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise UserError(f"no stub for Python {version} in {folder}", "a stub for it", "create it with Python 3.11")
    return Installation(folder / "bin" / "tritonserver", stub, environment)


@contextmanager
def backend_folder(installation: Installation) -> Iterator[Path | None]:
    """The folder of backends; None if the server finds them itself."""
    if installation.stub is None:
        yield None
        return
    with scratch_folder("backends") as folder:
        python = folder / "python"
        python.mkdir()
        for file in (*installation.backends.joinpath("python").iterdir(), installation.stub):
            (python / file.name).symlink_to(file.resolve())
        yield folder


def stub_environment(installation: Installation, outer: Mapping[str, str]) -> dict[str, str]:
    """``outer`` with the models' Python first on PATH, whose packages the stub uses."""
    inner = {**outer, "PATH": _absolute_folders(outer.get("PATH", os.defpath))}
    if installation.environment is not None:
        inner["PATH"] = f"{installation.environment / 'bin'}{os.pathsep}{inner['PATH']}"
        libraries = _library_folder(installation.environment)
        inner["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (libraries, outer.get("LD_LIBRARY_PATH"))))
    return inner


def _library_folder(environment: Path) -> str:
    """The folder of the environment's libpython, which must match its standard library; empty if there is none."""
    script = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'), sysconfig.get_config_var('INSTSONAME'))"
    done = subprocess.run([environment / "bin" / "python3", "-c", script], capture_output=True, text=True, check=True)
    folder, name = done.stdout.split()
    return folder if Path(folder, name).is_file() and name.endswith((".so", ".so.1.0")) else ""


def default_environments() -> tuple[Path, ...]:
    """The environment that ``make triton`` of this checkout creates, and that of this process.

    The working folder is excluded, because others may have put programs there.
    """
    return (Path(__file__).resolve().parents[1] / ".venv-triton", Path(sys.prefix))
