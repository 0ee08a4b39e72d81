"""The ``wan-trt`` command and its subcommands."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import wan_trt
from wan22.errors import UserError
from wan_trt.arguments import with_groups
from wan_trt.commands import (
    batch,
    bench,
    build,
    bundle,
    calibrate,
    client,
    demo,
    export,
    gateway,
    generate,
    inspect,
    looks,
    lora,
    mlperf,
    plan,
    presets,
    serve,
    synth,
    triton,
    validate,
)
from wan_trt.console import tolerate_any_encoding
from wan_trt.guard import CommandLine, guard

HELP = {"help_option_names": ["-h", "--help"]}
GROUPS = {
    "Make": (synth, export, calibrate, build),
    "Run": (generate, batch, demo),
    "Check": (plan, presets, looks, inspect, validate, bench, mlperf),
    "Serve": (triton, serve, client),
}

app = CommandLine(
    name="wan-trt",
    help="Wan2.2 video generation: PyTorch checkpoint → ONNX → engines → video, with proof of parity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"wan-trt {wan_trt.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the program itself; the callback of ``version`` handles it during parsing."""


for group, commands in GROUPS.items():
    for command in commands:
        named = app.command(command.__name__.rpartition(".")[2], rich_help_panel=group, context_settings=HELP)
        named(guard(with_groups(command.run)))


@app.command(
    "scale",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@guard
def scale() -> None:
    """Refuse the old name of ``python -m studies.full_size``, with any arguments."""
    raise UserError("wan-trt scale has moved", "python -m studies.full_size", "run it in a checkout of the source")


bundles = typer.Typer(no_args_is_help=True, help="Verify, sign, copy or clean up bundles.", context_settings=HELP)
for verb in (bundle.verify, bundle.sign, bundle.pack, bundle.clean):
    bundles.command(verb.__name__, context_settings=HELP)(guard(with_groups(verb)))
app.add_typer(bundles, name="bundle", rich_help_panel="Check")
loras = typer.Typer(no_args_is_help=True, help="Merge LoRAs into engines in blocks.", context_settings=HELP)
loras.command("apply", context_settings=HELP)(guard(with_groups(lora.apply)))
loras.callback()(lambda: None)  # keeps "apply" required, although it is the only command
app.add_typer(loras, name="lora", rich_help_panel="Make")


class _GatewayGroup(TyperGroup):
    """``wan-trt gateway`` runs one; ``key`` and ``move`` are commands about one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] in (["key"], ["move"]) else ["run", *args])


gateways = typer.Typer(cls=_GatewayGroup, help=gateway.run.__doc__, context_settings={"ignore_unknown_options": True})
gateways.command("run", context_settings=HELP)(guard(with_groups(gateway.run)))
keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys of clients.", context_settings=HELP)
for key_command in (gateway.add, gateway.list_keys, gateway.revoke):
    keys.command(key_command.__name__.removesuffix("_keys"), context_settings=HELP)(guard(with_groups(key_command)))
gateways.command("move", context_settings=HELP)(guard(with_groups(gateway.move)))
gateways.add_typer(keys, name="key")
app.add_typer(gateways, name="gateway", rich_help_panel="Serve")


def main() -> None:
    """Run the command line. Refuse arguments and a working folder that are not UTF-8, the encoding of all files."""
    try:
        words = [os.fsencode(word) for word in sys.argv[1:]]
        with contextlib.suppress(OSError):  # the folder may be gone
            words.append(os.fsencode(Path.cwd()))
        for word in words:
            try:
                word.decode()
            except UnicodeDecodeError:
                print(f"wan-trt: {word!r} | expected UTF-8 | rename it, or set a UTF-8 locale", file=sys.stderr)
                sys.exit(2)
        tolerate_any_encoding()
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        app()
    except KeyboardInterrupt:  # before the command began
        print("wan-trt: interrupted", file=sys.stderr)
        sys.exit(130)
