"""A plan in the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from engines.block_plan import BlockPlan
from engines.group_plan import Goal, GroupPlan, link_gb_s, reason
from engines.plan import EXPORT_RAM_GIB, Plan
from engines.precision_figures import read_figures
from engines.targets import Target, unsupported_reason
from wan22.costs import dit_flops, model_parameters
from wan22.precision import Precision
from wan22.quantities import human_bytes, video_text
from wan22.vae_memory import StagedVae


def as_text(plan: Plan) -> list[RenderableType]:
    """The output of ``wan-trt plan``: components, then the machine needed and the time it takes."""
    totals = Table(show_header=False)
    for name, value in (*_machine(plan), *_work(plan)):
        totals.add_row(name, value)
    return [_components(plan), totals, _vae(plan), *_remarks(plan)]


def cards_as_text(plans: Sequence[Plan]) -> Iterable[RenderableType]:
    """The output of ``wan-trt plan --cards``: what runs on which card in blocks."""
    plan = plans[0]
    names: dict[str, list[str]] = {}
    for each in plans:
        names.setdefault(str(each.request.precision), []).append(each.request.target.name)
    usual = max(names, key=lambda name: len(names[name]))
    what = plan.request.spec.name if len(names) > 1 else f"{plan.request.spec.name}, {usual}"
    what += f": {video_text(*plan.request.video)}"
    layers, text_layers = plan.request.spec.dit.layers, plan.request.spec.text_encoder.layers
    table = Table(
        "card", "GiB", "GB/s", "blocks", "text", "VAE", "seconds", "copy",
        title=f"{what}, {plan.tokens:,} tokens, in blocks", title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.no_wrap = True
    for each in plans:
        target, blocks, decoder = each.request.target, each.in_blocks, each.half_precision_decoder.fitting
        resident = _blocks(each).replace(f" of {layers}", "").replace("does not fit", "none fit")
        text, strips = (str(n) if n else "none" for n in (blocks.text_slots, decoder and decoder.strips))
        row = [target.name, f"{target.memory_gib:g}", f"{blocks.bus_gb_s:g}", resident, text, strips]
        forward, copy = blocks.streamed_forward_seconds, blocks.copy_seconds
        if forward is not None and blocks.forward_seconds is not None and copy is not None:
            row += [f"{forward:.3g}", f"{copy * blocks.stack.blocks / blocks.forward_seconds:.0%}"]
        table.add_row(*row)
    yield table
    if len(names) > 1:
        others = "".join(f", {name} on {', '.join(cards)}" for name, cards in names.items() if name != usual)
        yield f"precision: the recommended one of each card, {usual}{others}"
    least = _range(each.in_blocks.least_bytes for each in plans)
    block = _range(each.in_blocks.block_bytes for each in plans)
    yield f"blocks: resident ones of {layers}; a transformer takes at least {least}, and blocks of {block} stream"
    yield f"text: layers of the text encoder in memory, of {text_layers}"
    one = human_bytes(plan.half_precision_decoder.one.total)
    yield f"VAE: strips of a decoder in fp16 (export --vae-decoder fp16; one takes {one})"
    yield "seconds: of a forward, by roofline; copy: of a block, of the time of its kernels, hidden below 100%"


def _range(sizes: Iterable[float]) -> str:
    """As 5.63 GiB to 6.72 GiB; one size if all are alike."""
    ordered = sorted(sizes)
    return " to ".join(dict.fromkeys(map(human_bytes, (ordered[0], ordered[-1]))))


def groups_as_text(plans: Sequence[GroupPlan], chosen: Sequence[tuple[Goal, GroupPlan]]) -> Iterable[RenderableType]:
    """The output of ``wan-trt plan --gpus``: every split, then the best one for each goal."""
    first = plans[0]
    request, count = first.plan.request, first.gpus
    speed = link_gb_s(request.target, first.link)
    what = f"{request.spec.name}, {request.precision}, on {count} of {request.target.name}"
    share = "the roofline" if first.efficiency == 1 else f"{100 * first.efficiency:.0f} % of the roofline"
    title = f"{what}\n{video_text(*request.video)}, {request.steps} steps, {first.link} {speed:g} GB/s, {share}"
    columns = ("--parallel", "videos", "GiB", "sent GB", "step s", "video s", "an hour", "scaling")
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns:
        column.no_wrap = True
    for each in plans:
        row = [_split(each), str(each.replicas), f"{each.memory_bytes / 2**30:.1f}" if each.fits else "no fit"]
        row.append(f"{each.step_bytes / 1e9:.3g}")
        figures = (each.step_seconds, each.video_seconds, each.videos_per_hour)
        row += [
            "" if figure is None else f"{figure:,.3g}" if figure < 999.5 else f"{figure:,.0f}" for figure in figures
        ]
        scaling = each.efficiency_of_scaling
        table.add_row(*row, "" if scaling is None else f"{100 * scaling:.0f} %")
    yield table
    yield "videos: at a time, on all GPUs; GiB, sent in a step: of the GPU that has most"
    for goal, best in chosen:
        yield f"best for {goal}: {_split(best)}"
        yield from (f"  {part}" for part in reason(best, goal).split("; "))


def _split(plan: GroupPlan) -> str:
    return str(plan.split) or "one"


def precisions_as_text(plans: Sequence[Plan]) -> Iterable[RenderableType]:
    """The output of ``wan-trt plan --compare-precisions``: what every precision of a card costs and saves."""
    plan, figures = plans[0], read_figures()
    target, layers = plan.request.target, plan.request.spec.dit.layers
    table = Table(
        "precision", "error", "dB", "GiB", "blocks", "kernels", "step s",
        title=f"{plan.request.spec.name} on {target.name}: {video_text(*plan.request.video)}, {plan.tokens:,} tokens",
        title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.no_wrap = True
    for each in plans:
        found, error, latents = figures.get(each.request.precision), "", ""
        if found is not None:
            error = f"{found.worst:.2%}{'' if found.meets_aim else '*'}"
            latents = f"{min(found.latents_db.values()):.1f}"
        experts = sum(each.weights_bytes[expert] for expert in each.request.spec.experts) / 2**30
        blocks = _blocks(each).replace(f" of {layers}", "").replace(" in", ",") if each.has_blocks else ""
        kernels = found.kernels.get(target.name, ()) if found is not None else ()
        seconds = "" if each.step_seconds is None else f"{each.step_seconds:.2f}"
        row = (error, latents, f"{experts:.1f}", blocks, " + ".join(map(str, kernels)), seconds)
        table.add_row(str(each.request.precision), *row)
    yield table
    best = target.recommended_precision
    reason = "of the highest peaks, the one that errs least" if target.bf16_tflops else "no figures of this target"
    yield f"recommended: --precision {best} ({reason})"
    yield from _lacking(target)
    yield "error of a velocity (* misses its aim), dB of finished latents: the worst of two small twins with outliers"
    yield f"GiB: of all experts; blocks: resident ones of {layers}; seconds: by roofline, not measured"


def _lacking(target: Target) -> Iterable[str]:
    """Why the target has no other quantised precision: a line for every reason."""
    reasons: dict[str, list[str]] = {}
    for precision in (p for p in Precision if p.quantised and p not in target.precisions):
        reasons.setdefault(unsupported_reason(target, precision), []).append(str(precision))
    for why, names in reasons.items():
        yield f"not {', '.join(names)}: {why}"


def _remarks(plan: Plan) -> Iterable[str]:
    """Lines too long for a table."""
    if plan.usable_vram_bytes and plan.residency is None and not plan.has_blocks:
        usable, refusal = human_bytes(plan.usable_vram_bytes), plan.refusal
        yield f"nothing fits {usable}: {refusal.found}; {refusal.remedy}"
    yield f"peaks from: {plan.request.target.source}"


def _components(plan: Plan) -> Table:
    width, height, frames = plan.request.video
    rank = f" with branches of rank {plan.request.low_rank}" if plan.request.low_rank else ""
    what = f"{plan.request.spec.name}, {plan.request.precision}{rank}, for {plan.request.target.name}"
    table = Table(
        "component", "parameters", "weights", "scratch", "inputs, outputs",
        title=f"{what}: {video_text(width, height, frames)}, {plan.tokens:,} tokens", title_justify="left",
    )  # fmt: skip
    parameters = model_parameters(plan.request.spec)
    for memory in plan.memory:
        sizes = (memory.weights, memory.scratch, memory.inputs_and_outputs)
        count = parameters.get(memory.component, round(memory.weights / 4))  # a VAE's two engines share some
        table.add_row(memory.component, f"{count:,}", *map(human_bytes, sizes))
    return table


def _vae(plan: Plan) -> Table:
    """What a VAE in stages takes, and the strips that it needs."""
    budget = plan.usable_vram_bytes if plan.request.vram is None else plan.request.vram
    within = [f"strips in {human_bytes(budget)}"] if budget else []
    table = Table("VAE in strips, work", "one strip", *within, "at the least")
    for half in plan.staged_vae:
        chosen = [_strips(half.fitting) if half.fitting else "does not fit"] if budget else []
        table.add_row(f"{half.half}, {half.precision}", human_bytes(half.one.total), *chosen, _strips(half.least))
    return table


def _strips(size: StagedVae) -> str:
    return f"{size.strips}: {human_bytes(size.total)}, {size.work:.1f}x"


def _machine(plan: Plan) -> Iterable[tuple[str, str]]:
    yield "disk: bundle, engines", f"{human_bytes(plan.bundle_bytes)}, {human_bytes(plan.engines_bytes)}"
    yield "host memory: export, build", f"{EXPORT_RAM_GIB:.1f} GiB, {human_bytes(plan.build_ram_bytes)}"
    usable, in_blocks = plan.usable_vram_bytes, plan.has_blocks
    if usable and in_blocks:
        yield "GPU memory, at least", human_bytes(plan.in_blocks.least_bytes)
        yield "resident blocks", _blocks(plan)
        if copy := _copy(plan.in_blocks):
            yield f"copy of a block at {plan.in_blocks.bus_gb_s:g} GB/s", copy
        layers, slots = plan.request.spec.text_encoder.layers, plan.in_blocks.text_slots
        yield "text encoder", "does not fit" if slots is None else f"{slots} of {layers} layers in memory"
    if in_blocks and plan.request.vram is not None:  # which whole engines do not obey
        return
    prefix = "whole" if in_blocks else "GPU memory"
    for way, size in plan.vram.items():
        verdict = "" if not usable else f"; {'fits' if plan.fits[way] else 'exceeds'} {human_bytes(usable)}"
        yield f"{prefix}, {way}", human_bytes(size) + verdict
    if usable:
        name = "whole, --residency auto" if in_blocks else "--residency auto"
        yield name, plan.residency or ("nothing fits" if in_blocks else "nothing fits, see below")


def _blocks(plan: Plan) -> str:
    """What stays in memory if blocks may stream, and the slices of tokens."""
    choice, layers = plan.in_blocks.choice, plan.request.spec.dit.layers
    if choice is None:
        return "does not fit"
    slices = "" if choice.slices == 1 else f" in {choice.slices} slices"
    return f"{plan.in_blocks.resident} of {layers}{slices}"


def _copy(blocks: BlockPlan) -> str:
    """The share of a block's kernels that its copy takes; empty where every block is resident, or without figures."""
    if blocks.resident in (None, blocks.stack.blocks) or not blocks.forward_seconds or blocks.copy_seconds is None:
        return ""
    share = blocks.copy_seconds * blocks.stack.blocks / blocks.forward_seconds
    return f"{share:.0%} of its kernels' time, {'hidden' if share <= 1 else 'not all hidden'}"


def _work(plan: Plan) -> Iterable[tuple[str, str]]:
    forward, steps = dit_flops(plan.request.spec.dit, plan.tokens), plan.request.steps
    shares = {"linears": forward.linears, "self-attention": forward.self_attention, "cross": forward.cross_attention}
    yield "arithmetic of a forward", f"{forward.total / 1e15:.3f} PFLOP"
    yield "shares of it", ", ".join(f"{name} {flops / forward.total:.0%}" for name, flops in shares.items())
    of_all = f"{steps * plan.step_flops / 1e15:.0f} PFLOP"
    yield f"arithmetic of a step, of {steps} steps", f"{plan.step_flops / 1e15:.2f} PFLOP, {of_all}"
    yield "arithmetic of the VAE", f"{plan.vae_flops / 1e15:.2f} PFLOP"
    if plan.step_seconds is None or plan.video_seconds is None:
        yield "time", f"no figures for {plan.request.target.name}"
    else:
        yield "at least, by roofline", f"{plan.step_seconds:.2f} s a step, {plan.video_seconds / 60:.1f} min a video"
