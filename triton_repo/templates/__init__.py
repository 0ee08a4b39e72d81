"""The ``model.py`` of each kind of model."""

from pathlib import Path


def place(template: str, version: Path) -> None:
    """Write the template as ``model.py`` into the folder ``version`` of a model's version."""
    version.mkdir(parents=True)
    (version / "model.py").write_text(Path(__file__).with_name(f"{template}.py").read_text())
