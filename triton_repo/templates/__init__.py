"""The ``model.py`` of each kind of model, and how a repository gets it."""

from pathlib import Path


def place(template: str, version: Path) -> None:
    """Writes the template of that name as ``model.py`` of the model version ``version``."""
    version.mkdir(parents=True)
    (version / "model.py").write_text(Path(__file__).with_name(f"{template}.py").read_text())
