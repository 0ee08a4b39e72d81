"""``wan-trt plan``: the cost of a model on a target, without its weights."""

import json
from typing import Annotated

import msgspec
import typer

from wan22.errors import UserError
from wan22.quantities import parse_bytes
from wan22.specs import Precision, precision_named, spec_named
from wan_trt.arguments import PRECISIONS, Frames, Size, Vram, size_of
from wan_trt.console import console


def run(
    model: Annotated[str, typer.Argument(help="A model, such as t2v-a14b.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(help="GPU such as rtx4090 or h100, cuda (ONNX Runtime on any GPU), cpu, or auto.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help=f"{PRECISIONS}; by default fp32 for cpu, bf16 for a GPU."),
    ] = None,
    size: Size = None,
    frames: Frames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    vram: Vram = None,
    cards: Annotated[bool, typer.Option("--cards", help="A table of all cards, for --topology blocks.")] = False,
    compare_precisions: Annotated[
        bool, typer.Option("--compare-precisions", help="A table of all precisions of the target.")
    ] = False,
    bus: Annotated[
        float | None, typer.Option(help="GB/s from host memory to the card; by default its PCIe's.", min=0.1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Print sizes, memory, arithmetic and roofline times of a model, without weights or a GPU."""
    from engines.plan import card_plans, make_plan
    from engines.plan_view import as_text, cards_as_text, precisions_as_text
    from engines.precision_figures import compare_precisions as plans_of
    from engines.precision_figures import read_figures
    from engines.targets import target_named

    spec = spec_named(model)
    width, height = size_of(size) or spec.sampling.sizes[0]
    video = (width, height, spec.sampling.frames if frames is None else frames)
    asked = None if precision is None else precision_named(precision)
    budget = None if vram is None else parse_bytes(vram, "--vram")
    if cards:
        if target is not None or vram is not None:
            raise UserError("--cards with --target or --vram", "all cards, with all of their memory", "leave them out")
        narrowest = min(Precision, key=lambda each: (each.linears.bits, each.attention.bits))
        plans = card_plans(spec, asked or narrowest, video, steps, bus)
    elif compare_precisions:
        if target is None or precision is not None or vram is not None:
            found = "--compare-precisions without --target, or with --precision or --vram"
            raise UserError(found, "a target, in all of its precisions", "name a --target alone")
        plans = plans_of(spec, target_named(target), video, steps)
    else:
        if target is None:
            raise UserError("no --target", "a GPU, cpu or auto", "name one, or give --cards for all")
        aim = target_named(target)
        plans = [make_plan(spec, aim, asked or aim.default_precision, video, steps, budget, bus)]
    if as_json:
        entries = [plan.as_json() for plan in plans]
        measured = read_figures() if compare_precisions else {}
        for entry in entries if compare_precisions else ():
            entry["figures"] = msgspec.to_builtins(measured.get(Precision(entry["precision"])))
        print(json.dumps(entries if cards or compare_precisions else entries[0]))
        return
    shown = cards_as_text(plans) if cards else precisions_as_text(plans) if compare_precisions else as_text(plans[0])
    for part in shown:
        console.print(part)
