"""Which extras of this package have a module that is missing, read from what the package declares."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

PACKAGE = "wan-trt"
# Modules whose project has another name.
PROJECTS = {
    "PIL": "pillow",
    "cupy": "cupy-cuda13x",
    "google": "protobuf",
    "pynvml": "nvidia-ml-py",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def told_missing(module: str, command: str) -> str:
    """The line about a ``module`` that an extra installs, the one of ``command`` before others; "" where none does."""
    extras = extras_with(module)
    if not extras:
        return ""
    best = command if command in extras else extras[0]
    installs = " or ".join(f"{PACKAGE}[{extra}]" for extra in extras)
    return f"no module {module} | expected what {installs} installs | pip install '{PACKAGE}[{best}]'"


def extras_with(module: str) -> tuple[str, ...]:
    """The extras that install ``module``; none for what is always there, this project's own, or unknown."""
    top = module.partition(".")[0]
    project = PROJECTS.get(top, top.replace("_", "-"))
    return tuple(extra for name, extra in _declared() if name == project and extra != "dev")


def _declared() -> Iterator[tuple[str, str]]:
    """Project and extra of every requirement that belongs to an extra."""
    try:
        lines = requires(PACKAGE) or ()
    except PackageNotFoundError:  # run from its sources
        return
    for line in lines:
        if found := re.match(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", line):
            yield found[1].lower().replace("_", "-"), found[2]
