"""``wan-trt plan``: the cost of a model on a target, without its weights."""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from wan22.errors import UserError
from wan22.parallel import parse_split
from wan22.precision import Precision, check_low_rank, precision_named
from wan22.quantities import parse_bytes
from wan22.specs import spec_named
from wan_trt.arguments import PRECISIONS, Frames, LowRank, Size, size_of, with_options
from wan_trt.console import console
from wan_trt.memory_options import Vram

if TYPE_CHECKING:
    from engines.group_plan import Goal, Link
    from engines.plan import Plan


GROUPS = {
    "gpus": Annotated[int | None, typer.Option(help="Compare how so many GPUs divide the work.", min=1, max=72)],
    "parallel": Annotated[
        str | None, typer.Option(metavar="HOW", help="Only this split: cfg2, ulyssesN, experts, vaeN with commas.")
    ],
    "link": Annotated[
        Literal["nvlink", "pcie4", "pcie5"] | None, typer.Option(help="Between GPUs; by default the GPU's.")
    ],
    "goal": Annotated[
        Literal["latency", "throughput"] | None, typer.Option(help="The best split for this; by default for both.")
    ],
    "efficiency": Annotated[
        float | None,
        typer.Option(help="Share of the roofline that a GPU reaches, by wan-trt bench; by default 1.", min=0.01, max=1),
    ],
}


@with_options(GROUPS)
def run(
    model: Annotated[str, typer.Argument(help="A model, such as t2v-a14b.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(help="GPU such as rtx4090 or h100, cuda (ONNX Runtime on any GPU), cpu, or auto.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help=f"{PRECISIONS}; by default fp32 for cpu, bf16 for a GPU."),
    ] = None,
    low_rank: LowRank = 0,
    size: Size = None,
    frames: Frames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1, max=1000)] = None,
    vram: Vram = None,
    cards: Annotated[bool, typer.Option("--cards", help="A table of all cards, for engines in blocks.")] = False,
    compare_precisions: Annotated[
        bool, typer.Option("--compare-precisions", help="A table of all precisions of the target.")
    ] = False,
    bus: Annotated[
        float | None,
        typer.Option(help="GB/s from host memory to the card; by default its PCIe's.", min=0.1, max=1e4),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    **shared: Any,
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
    given = {"--target": target, "--precision": precision, "--vram": vram, "--bus": bus, "--low-rank": low_rank or None}
    given |= {f"--{name}": shared[name] for name in GROUPS}
    in_groups = shared["gpus"] is not None or shared["parallel"] is not None
    if cards and compare_precisions:
        raise UserError("--cards with --compare-precisions", "one table", "name a --target for all of its precisions")
    if cards:
        _refuse_beside("--cards", given, ("--precision", "--bus"), "all cards, each alone with all of its memory")
        plans = card_plans(spec, asked, video, steps, bus)
    elif compare_precisions:
        if target is None:
            raise UserError("--compare-precisions without --target", "a target, in all of its precisions", "name one")
        _refuse_beside("--compare-precisions", given, ("--target",), "a target, in all of its precisions")
        plans = plans_of(spec, target_named(target), video, steps)
    else:
        if target is None:
            raise UserError("no --target", "a GPU, cpu or auto", "name one, or give --cards for all")
        if not in_groups:
            several = ("--link", "--goal", "--efficiency")
            _refuse_beside("one GPU", given, given.keys() - several, "several GPUs for it", "add --gpus N")
        aim = target_named(target)
        plan = make_plan(spec, aim, asked or aim.default_precision, video, steps, budget, bus)
        check_low_rank(low_rank, [plan.request.precision.linears])
        plans = [replace(plan, request=replace(plan.request, low_rank=low_rank))]
    if in_groups:
        _of_groups(plans[0], **shared, as_json=as_json)
        return
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


def _refuse_beside(
    what: str, given: Mapping[str, object], taken: Collection[str], expected: str, remedy: str = "leave the others out"
) -> None:
    """Refuse the options that ``what`` would not use."""
    unused = [name for name, value in given.items() if value is not None and name not in taken]
    if unused:
        raise UserError(f"{what} with {', '.join(unused)}", expected, remedy)


def _of_groups(
    plan: "Plan",
    gpus: int | None,
    parallel: str | None,
    link: "Link | None",
    goal: "Goal | None",
    efficiency: float | None,
    *,
    as_json: bool,
) -> None:
    from engines.group_plan import GOALS, GroupPlan, best, group_plans, link_gb_s, reason, usual_link
    from engines.plan_view import groups_as_text

    target = plan.request.target
    if plan.step_seconds is None:
        raise UserError(f"--gpus for {target.name}", "a GPU whose figures are known", "name another --target")
    link, share = link or usual_link(target), efficiency or 1.0
    link_gb_s(target, link)
    if parallel is not None:
        split = parse_split(parallel)
        split.check(plan.request.spec)
        count = split.members if gpus is None else gpus
        if count % split.members:
            found = f"--gpus {count} for --parallel {split}"
            raise UserError(found, f"a multiple of {split.members}", f"use --gpus {split.members}")
        plans = [GroupPlan(plan, split, count, link, share)]
    else:
        plans = group_plans(plan, gpus or 1, link, share)
    of_goals = [(each, best(plans, each)) for each in ((goal,) if goal else GOALS)]
    chosen = [(each, its) for each, its in of_goals if its is not None and parallel is None]
    if as_json:
        told = {each: {"split": str(its.split) or "one", "reason": reason(its, each)} for each, its in chosen}
        print(json.dumps({"splits": [each.as_json() for each in plans], "best": told}))
        return
    for part in groups_as_text(plans, chosen):
        console.print(part)
