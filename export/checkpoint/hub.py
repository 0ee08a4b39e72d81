"""Checkpoints named instead of pointed to: downloaded from the Hugging Face hub into its usual cache."""

import re
from pathlib import Path

from wan22.errors import UserError

WANTED = ("*.json", "*.safetensors", "*.pth", "*spiece.model")  # leaves pictures and examples behind


def is_hub_name(where: str | Path) -> bool:
    """Whether ``where`` reads ``owner/name`` and is nothing on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(where))) and not Path(where).exists()


def downloaded(name: str) -> Path:
    """The folder of the repository ``name``, downloaded unless it already is. The client draws its own progress.

    Raises:
        UserError: no network and not in the cache, no such repository, no access, disk full.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # the client has a dozen kinds for network, access, names and disk, with no common base
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        found = f"no folder {name} here, and the hub: {reason}"
        raise UserError(found, "a folder or a repository", "check name, network and access (hf auth login)") from error
