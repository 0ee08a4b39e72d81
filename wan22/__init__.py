"""Shared by all stages: model specs, bundles, errors. Imports numpy at most."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version_of


def version() -> str:
    """The version of the installed package; "unknown" where it runs from sources that are not installed."""
    try:
        return _version_of("wan-trt")
    except PackageNotFoundError:
        return "unknown"
