"""Help and tables: every option explained and in its group, every table in one style and without wrapped rows."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

import wan_trt
from engines.group_plan import group_plans, usual_link
from engines.plan import card_plans, make_plan
from engines.plan_view import as_text, cards_as_text, groups_as_text, precisions_as_text
from engines.precision_figures import compare_precisions
from engines.targets import TARGETS
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import PUBLISHED
from wan_trt.arguments import GROUPS, seed_of
from wan_trt.cli import app
from wan_trt.commands import presets
from wan_trt.console import apply_style


def visible(group, path=()):
    """Every command with its words: ``("lora", "apply"), command``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from visible(command, (*path, name))
        elif not command.hidden:
            yield (*path, name), command


COMMANDS = dict(visible(get_command(app)))
PARAMETERS = {(path, p.name): p for path, command in COMMANDS.items() for p in command.params if p.name != "help"}


def invoke(*words, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(word) for word in words])


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert wan_trt.__version__ == version("wan-trt")
    assert invoke("--version").output == f"wan-trt {version('wan-trt')}\n"


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=" ".join)
def test_h_is_short_for_help(path):
    assert invoke(*path, "-h").output == invoke(*path, "--help").output != ""


def test_shell_completion_can_be_installed():
    assert "--install-completion" in invoke("-h").output


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_says_in_one_sentence_what_it_does(path):
    first = COMMANDS[path].help.split("\n\n")[0]
    assert first.endswith(".")
    assert ". " not in first


@pytest.mark.parametrize("key", PARAMETERS, ids=lambda key: f"{' '.join(key[0])} {key[1]}")
def test_an_option_is_explained_in_one_sentence(key):
    if not getattr(PARAMETERS[key], "hidden", False):
        assert PARAMETERS[key].help


def test_options_are_in_the_group_of_their_name():
    names = {name for _, name in PARAMETERS}
    for group, members in GROUPS.items():
        assert set(members) <= names, group
    generate = COMMANDS[("generate",)].params
    alone = {p.name for p in generate if p.param_type_name == "option" and p.rich_help_panel is None}
    assert alone <= {"help", "again"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_help_and_tables_are_printed_in_any_encoding(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    for words in (["--help"], ["generate", "--help"], ["presets"]):
        code = "from wan_trt.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b""), words
        assert done.stdout.decode(encoding)


def lines(renderable, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(apply_style(renderable))
    return console.export_text().rstrip().count("\n")


def fits(renderable):
    """No row needs a second line at 80 columns."""
    return lines(renderable, 80) == lines(renderable, 500)


def test_a_wrapped_row_is_noticed():
    table = Table("a")
    table.add_row("word " * 30)
    assert not fits(table)


@pytest.mark.parametrize("spec", PUBLISHED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_fits_80_columns(spec, target):
    precision = Precision.FP8_ATTN if Precision.FP8_ATTN in TARGETS[target].precisions else Precision.FP32
    tables = [part for part in as_text(make_plan(spec, TARGETS[target], precision)) if isinstance(part, Table)]
    assert 2 <= len(tables) <= 3  # the third: the VAE in stages
    assert all(map(fits, tables))


@pytest.mark.parametrize("target", ["h100", "rtx4060"])
def test_plans_of_cards_precisions_and_groups_fit_80_columns(target):
    plan = make_plan(PUBLISHED[0], TARGETS[target], Precision.FP8_ATTN)
    groups = groups_as_text(group_plans(plan, 8, usual_link(TARGETS[target]), 1.0), [])
    cards = cards_as_text(card_plans(PUBLISHED[0], None))
    precisions = precisions_as_text(compare_precisions(PUBLISHED[0], TARGETS[target]))
    tables = [part for shown in (groups, cards, precisions) for part in shown if isinstance(part, Table)]
    assert len(tables) == 3
    for table in tables:
        table.title = None  # which is a sentence
        assert fits(table)
    told = io.StringIO()
    Console(file=told, width=80).print(tables[0])
    assert "e+" not in told.getvalue()


def test_the_presets_fit_80_columns(monkeypatch):
    printed = []
    monkeypatch.setattr(presets.console, "print", lambda *parts: printed.extend(parts))
    presets.run()
    tables = [part for part in printed if isinstance(part, Table)]
    assert len(tables) == 2
    assert all(map(fits, tables))


def test_numbers_stand_to_the_right():
    table = Table("name", "ms")
    table.add_row("high_noise", "29.5")
    assert [column.justify for column in apply_style(table).columns] == ["left", "right"]


def test_minus_one_draws_a_seed_and_prints_it(capsys):
    drawn = seed_of(-1)
    assert capsys.readouterr().err == f"seed {drawn}\n"
    assert seed_of(-1) != drawn or seed_of(-1) != drawn
    assert seed_of(7) == 7


@pytest.mark.parametrize("seed", [-2, 2**64])
def test_a_seed_that_torch_does_not_take(seed):
    with pytest.raises(UserError, match=f"seed {seed}"):
        seed_of(seed)
