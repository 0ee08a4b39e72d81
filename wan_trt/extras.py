"""Find the extra of this package that installs a missing module, from the package's metadata."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

PACKAGE = "wan-trt"
# projects whose name differs from their module's
PROJECTS = {
    "PIL": "pillow",
    "cupy": "cupy-cuda13x",
    "google": "protobuf",
    "mlperf_loadgen": "mlcommons-loadgen",
    "pynvml": "nvidia-ml-py",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def missing_module_line(module: str, command: str) -> str:
    """The error line for a missing ``module``, preferring the extra named like ``command``; "" if no extra has it."""
    extras = extras_with(module)
    if not extras:
        return ""
    best = command if command in extras else extras[0]
    installs = " or ".join(f"{PACKAGE}[{extra}]" for extra in extras)
    return f"{module} is not installed | expected the modules of {installs} | pip install '{PACKAGE}[{best}]'"


def extras_with(module: str) -> tuple[str, ...]:
    """The extras that install ``module``; none for modules of the base install, of this project, or unknown ones."""
    top = module.partition(".")[0]
    project = PROJECTS.get(top, top.replace("_", "-"))
    return tuple(extra for name, extra in _extra_requirements() if name == project and extra != "dev")


def _extra_requirements() -> Iterator[tuple[str, str]]:
    """The project and the extra of every requirement of an extra."""
    try:
        lines = requires(PACKAGE) or ()
    except PackageNotFoundError:  # not installed, run from source
        return
    for line in lines:
        if found := re.match(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", line):
            yield found[1].lower().replace("_", "-"), found[2]
