"""Download checkpoints by name from the Hugging Face hub into its usual cache."""

import re
from pathlib import Path

from export.checkpoint import diffusers, official, single_files
from export.checkpoint.layouts import layout_named
from wan22.errors import UserError

WANTED = ("*.json", "*.safetensors", "*.pth", "*spiece.model")  # leaves pictures and examples behind


def is_hub_name(where: str | Path) -> bool:
    """True if ``where`` has the form ``owner/name`` or ``owner/name@revision`` and no such path exists."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(where))) and not Path(where).exists()


def download(where: str) -> Path:
    """Download the repository unless it is in the cache, and return its folder. The client shows progress.

    A repository without a complete layout in its list of files is refused before any download.

    Raises:
        UserError: no network and not in the cache, no such repository, no access, disk full, or another layout.
    """
    name, _, revision = where.partition("@")
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        online = True
        try:
            files = HfApi().list_repo_files(name, revision=revision or None)
        except HfHubHTTPError:  # the hub's own answer
            raise
        except Exception:  # one of many network errors: try the cache
            online = False
        if online:
            _check_files(where, files)
        wanted = list(WANTED)
        folder = snapshot_download(name, revision=revision or None, allow_patterns=wanted, local_files_only=not online)
        return Path(folder)
    except UserError:
        raise
    except Exception as error:  # the client's errors for network, access, names and disk have no common base
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        found = f"no folder {name} here, and the hub: {reason}"
        raise UserError(found, "a folder or a repository", "check name, network and access (hf auth login)") from error


def _check_files(where: str, files: list[str]) -> None:
    """Refuse a repository whose file names have no supported layout."""
    folders = {f"{file.partition('/')[0]}/" for file in files if "/" in file}
    layout = layout_named({*files, *folders})
    if layout in (diffusers, official) and any(file.endswith((".safetensors", ".pth")) for file in files):
        return
    weights = [file for file in files if file.endswith((".safetensors", ".gguf", ".pth", ".pt", ".bin"))]
    kind = "GGUF files" if weights and all(file.endswith(".gguf") for file in weights) else "single files"
    what = f"{len(weights)} {kind}: {', '.join(weights[:2])}, …" if weights else "no weights"
    remedy = f"download the files of one model and name them: {' '.join(single_files.OPTIONS.values())}"
    raise UserError(f"{where} holds {what}", "the official or the -Diffusers layout", remedy)


def commit_of(where: str, folder: Path) -> str:
    """The commit of a snapshot, which names its folder in the hub client's cache; "" for other folders."""
    found = is_hub_name(where) and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if found else ""
