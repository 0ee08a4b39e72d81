"""Which version of the official code a clone holds."""

import subprocess
from pathlib import Path


def commit_of(repo: Path) -> str:
    """The commit that is checked out at ``repo``, twelve digits of it; "" where git does not know."""
    if not (repo / ".git").exists():  # git would answer for a repository around it
        return ""
    try:
        asked = subprocess.run(
            ["git", "-C", str(repo), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
