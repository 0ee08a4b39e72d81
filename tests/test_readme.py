"""The README tells the truth about files and commands.

``python tests/test_readme.py`` rewrites the file tree from the first lines of the modules' docstrings.
"""

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ROOMS = ("wan_trt", "wan22", "export", "engines", "runtime", "triton_repo", "validate", "studies")
BEGIN, END = "<!-- files -->\n```\n", "```\n<!-- /files -->"


def tree() -> str:
    """Every module with the first line of its docstring."""
    lines = []
    for room in ROOMS:
        lines.append(f"{room}/")
        for path in sorted((ROOT / room).rglob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            name = path.relative_to(ROOT / room).as_posix()
            lines.append(f"  {name:<28} {said.partition(chr(10))[0]}".rstrip())
    return "\n".join(lines) + "\n"


def readme_parts() -> tuple[str, str, str]:
    before, _, rest = README.read_text().partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


def commands() -> list[str]:
    """Every line of ``wan-trt`` or of a study in the shell blocks of the README and the pages beside it."""
    pages = [README, *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(("wan-trt ", "python -m studies."))]


def test_the_file_tree_is_that_of_the_repository():
    assert readme_parts()[1] == tree(), "run: python tests/test_readme.py"


def test_every_module_says_what_it_is():
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [path for path in modules if not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("line", commands())
def test_every_command_that_is_shown_has_the_options_it_is_shown_with(line, capsys):
    words = shlex.split(line, comments=True)
    study = words[0] == "python"
    app = import_module(f"{words[2]}.__main__" if study else "wan_trt.cli").app
    with pytest.raises(SystemExit) as left:
        app(["--help"] if study else [words[1], "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    shown = [word.partition("=")[0] for word in words[3 if study else 2 :] if word.startswith("-")]
    assert [option for option in shown if option not in told] == []


if __name__ == "__main__":
    before, _, after = readme_parts()
    README.write_text(before + BEGIN + tree() + END + after)
