"""``wan-trt looks``: the cinematic terms that an option puts in front of a prompt."""

from rich.table import Table

from wan22.looks import GROUPS, LOOKS
from wan_trt.console import console


def run() -> None:
    """List named looks and cinematic terms: words in the prompt, the model's only control of light and camera."""
    looks = Table("--look", "terms", title="Looks")
    for name, terms in LOOKS.items():
        looks.add_row(name, ", ".join(terms))
    words = Table("option", "one of", "terms", title="Terms")
    for name, group in GROUPS.items():
        words.add_row(f"--{group.option}", name, ", ".join(group.terms))
    console.print(looks, words)
    console.print("A term replaces that of a look. With an image only --movement makes sense.")
