"""A bench in the terminal: tables that fit 80 columns, then remarks on the machine."""

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from validate.bench.footprint import Footprint
from validate.bench.machine import BUSY
from validate.bench.report import TOLERANCE, BaselineComparison, BenchReport, Change
from validate.bench.result import BenchResult, Piece, memory_measurements
from validate.bench.samples import Ratio, Samples
from validate.bench.step_cache import CacheTimes
from validate.bench.whole_run import Runs, step_ratio, total_ratio
from validate.bench.work import COMPILED, EAGER, OURS
from validate.gate import check_mark
from wan22.quantities import video_text

NAMES = {OURS: "ours", EAGER: "PyTorch eager", COMPILED: "torch.compile"}
NEW_PROMPT = "  first of a prompt"  # a row below the piece's row
COUNTED = {"graph": "counted on the graphs", "spec": "from the model's formulas"}
CHANGES_SHOWN = 12
TIMES = (
    ("text", "text_s"), ("image", "image_s"), ("all steps", "denoise_s"), ("decode", "decode_s"),
    ("first frame after", "first_frame_s"), ("total, without loading", "total_s"), ("total, p90", "total_p90_s"),
    ("expert swap", "expert_swap_s"), ("opening", "open_s"),
)  # fmt: skip
SHARES = (
    ("VAE's share of the total, %", "vae_share_percent"),
    ("of a step outside engines, %", "host_overhead_percent"),
)
LOADING = ("expert_swap_s", "open_s")  # not comparable: each side reads different files


def as_text(report: BenchReport) -> "Iterator[RenderableType]":
    """Yield the output of ``wan-trt bench`` for a terminal."""
    yield from _result(report.result)
    if report.comparison is not None:
        yield from _comparison(report.comparison)
    for verdict in report.verdicts:
        yield check_mark(verdict, str(verdict))
    for fault in report.result.faults:
        yield check_mark(False, fault)


def _result(result: BenchResult) -> "Iterator[RenderableType]":
    video = video_text(*(result.facts[name] for name in ("width", "height", "frames")))
    title = "{model} {precision}: {video}, {tokens:,} tokens".format(**result.facts, video=video)
    yield Text(title, "bold")
    yield _times(result.pieces)
    if len(result.pieces[0].samples) > 1:
        yield _ratios(result.pieces)
    yield _work(result.pieces)
    if any(piece.graphs for piece in result.pieces):
        yield _graphs(result.pieces)
    memory = {piece.name: piece.memory for piece in result.pieces} | {"prompt to frames": result.memory}
    if any(memory.values()):
        yield _memory(memory)
    if result.runs:
        yield _run_table(result.runs)
        yield _steps(result.runs)
        if "streamed_step_bytes" in (figures := result.runs[OURS].figures()):
            yield _streamed(figures)
    if result.cache is not None:
        yield _cache(result.cache)
    yield from _remarks(result)


# -- pieces


def _times(pieces: Sequence[Piece]) -> "Table":
    sides, has_energy = list(pieces[0].samples), any(piece.samples[OURS].joules for piece in pieces)
    headings = [NAMES[side] for side in sides] + [f"{NAMES[side]}, J" for side in sides if has_energy]
    table = _table("Time, ms: median (p90)", "", *headings)
    for piece in pieces:
        energy = [f"{piece.samples[side].energy_j or 0:,.1f}" for side in sides if has_energy]
        table.add_row(piece.name, *(_milliseconds(piece.samples.get(side)) for side in sides), *energy)
        if piece.new_prompt:
            table.add_row(NEW_PROMPT, *(_milliseconds(piece.new_prompt.get(side)) for side in sides))
    return table


def _ratios(pieces: Sequence[Piece]) -> "Table":
    others = [side for side in pieces[0].samples if side != OURS]
    table = _table("Times as long as ours: median (p10-p90)", "", *(NAMES[s] for s in others), "rel L2")
    for piece in pieces:
        table.add_row(piece.name, *(_ratio(piece.ratio(side)) for side in others), _difference(piece))
        if piece.new_prompt:
            table.add_row(NEW_PROMPT, *(_ratio(piece.ratio(side, new_prompt=True)) for side in others))
    return table


def _difference(piece: Piece) -> Text | str:
    """The largest distance between the results."""
    if piece.not_finite:
        return Text(f"NaN: {', '.join(piece.not_finite)}", "red")
    return f"{max(piece.difference.values()):.0e}"


def _work(pieces: Sequence[Piece]) -> "Table":
    title = f"Work, and the least time that the roofline allows; {COUNTED[pieces[0].cost.source]}"
    table = _table(title, "", "GFLOP", "GB", "least ms", "reached, %")
    for piece in pieces:
        roof = ("", "")
        if piece.roofline_s is not None:
            roof = (f"{1000 * piece.roofline_s:,.3g}", f"{piece.roofline_percent:.0f}")
        table.add_row(piece.name, f"{piece.cost.total_flop / 1e9:,.4g}", f"{piece.cost.bytes / 1e9:.3g}", *roof)
    return table


def _graphs(pieces: Sequence[Piece]) -> "Table":
    table = _table("Graphs of pieces that are several calls, ms: median (p90)", "", "ours")
    for name, samples in (item for piece in pieces for item in piece.graphs.items()):
        table.add_row(name, _milliseconds(samples))
    return table


def _memory(measured: Mapping[str, Mapping[str, Footprint]]) -> "Table":
    """Host memory and, with a GPU, device memory. ``measured`` holds footprints by row and side."""
    sides = [side for side in NAMES if any(side in prints for prints in measured.values())]
    on_device = [side for side in sides if any(_on_device(prints.get(side)) for prints in measured.values())]
    title = "Peak memory, MiB, each in a separate process: total (without libraries)"
    ratios = ["ours / PyTorch"] if EAGER in sides else []
    table = _table(title, "", *(NAMES[side] for side in sides), *ratios, *(f"{NAMES[side]}, GPU" for side in on_device))
    for name, prints in measured.items():
        used = [prints.get(side) for side in sides]
        cells = [f"{_mebibytes(its.peak)} ({_mebibytes(its.beyond_libraries)})" if its else "" for its in used]
        if ratios:
            found = dict(memory_measurements(prints))
            both = (found.get("memory_ratio"), found.get("memory_ratio_beyond_libraries"))
            cells.append("" if None in both else "{:.2f} ({:.2f})".format(*both))
        if prints:
            table.add_row(name, *cells, *(_on_device(prints.get(side)) for side in on_device))
    return table


def _on_device(used: Footprint | None) -> str:
    """All GPU memory in use or, if unknown, that of PyTorch's tensors."""
    size = used and (used.device or used.device_tensors)
    return _mebibytes(size) if size else ""


# -- whole runs


def _run_table(runs: Mapping[str, Runs]) -> "Table":
    figures = {side: found.figures() for side, found in runs.items()}
    title = f"From prompt to frames, s: median of {len(runs[OURS].each)}"
    table = _table(title, "", *(NAMES[side] for side in runs), *(["ratio"] if EAGER in runs else []))
    for label, key in TIMES:
        values = {side: figures[side].get(key) for side in runs}
        if any(values.values()):
            shown = ["" if value is None else f"{value:.3f}" for value in values.values()]
            table.add_row(label, *shown, *([_quotient(key, values, runs)] if EAGER in runs else []))
    for label, key in SHARES:
        table.add_row(label, *(f"{figures[side][key]:.1f}" for side in runs))
    return table


def _quotient(key: str, values: Mapping[str, float | None], runs: Mapping[str, Runs]) -> str:
    """PyTorch's time over ours."""
    if key == "total_s":
        return _ratio(total_ratio(runs[EAGER], runs[OURS]))
    ours, eager = values[OURS], values[EAGER]
    return f"{eager / ours:.2f}" if key not in LOADING and ours and eager else ""


def _steps(runs: Mapping[str, Runs]) -> "Table":
    title = f"Steps, ms: medians of {len(runs[OURS].each)}"
    if EAGER in runs:
        title += f"; PyTorch takes {_ratio(step_ratio(runs[EAGER], runs[OURS]))} times as long"
    others = [found.steps for side, found in runs.items() if side != OURS]
    table = _table(title, "step", "expert", "ours", "in engines", *(NAMES[side] for side in runs if side != OURS))
    for index, step in enumerate(runs[OURS].steps):
        times = [step.seconds, step.engine_seconds, *(steps[index].seconds for steps in others)]
        table.add_row(str(index + 1), step.component, *(f"{1000 * seconds:,.1f}" for seconds in times))
    return table


def _streamed(figures: Mapping[str, float]) -> "Table":
    table = _table("Weights of blocks that stream", "", "ours")
    table.add_row("copied a step, MiB", f"{figures['streamed_step_bytes'] / 2**20:,.1f}")
    table.add_row("hidden behind computation a step, ms", f"{figures['stream_hidden_step_ms']:,.1f}")
    table.add_row("waited for a step, ms", f"{figures['stream_stall_step_ms']:,.1f}")
    table.add_row("waited for at the change of expert, ms", f"{figures['switch_stall_ms']:,.1f}")
    return table


def _cache(found: CacheTimes) -> "Table":
    table = _table("Denoising with the step cache", "", "exact", "cached", "speed-up", "saved, %")
    times = found.exact_s, found.cached_s, found.exact_s / found.cached_s
    gained = f"{times[2]:.2f}", f"{100 * (1 - found.cached_s / found.exact_s):.0f}"
    if not any(skipped for skipped, _ in found.by_expert.values()):
        gained = "skipped nothing", ""
    table.add_row("all steps, s", *(f"{value:.3f}" for value in times[:2]), *gained)
    for name, (skipped, steps) in found.by_expert.items():
        table.add_row(f"computed steps, {name}", str(steps), str(steps - skipped), "", "")
    share = 100 * found.overhead_ms / found.step_ms
    table.caption = (
        f"the cache adds {found.overhead_ms:.3f} ms to a computed step of {found.step_ms:,.1f} ms ({share:.2f} %) "
        f"and keeps {found.held_latents:.2g} latents"
    )
    table.caption_justify = "left"
    return table


def _remarks(result: BenchResult) -> Iterator[Text | str]:
    if compiling := {piece.name: piece.first_s[COMPILED] for piece in result.pieces if COMPILED in piece.first_s}:
        firsts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in compiling.items())
        yield f"torch.compile's first run, including compilation: {firsts}"
    rates = [f"{rate / 1e12:.3g} TFLOPS {precision}" for precision, rate in result.peak.flops_per_s.items() if rate]
    yield f"roofline: {', '.join(rates)}, {result.peak.bytes_per_s / 1e9:.3g} GB/s; {result.peak.source}"
    machine, (before, after) = result.machine, result.conditions["load_average"]
    host = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")
    host += "; PyTorch on the GPU" if result.conditions.get("reference_device") == "cuda" else ""
    yield f"machine: {host}; load average {before:.1f} before and {after:.1f} after"
    if before > BUSY * machine["cores"]:
        yield Text(
            "the machine was busy: times are too long and ratios too good, because PyTorch's spinning threads "
            "suffer most. Measure again on an idle machine",
            "yellow",
        )


# -- comparisons


def _comparison(comparison: BaselineComparison) -> "Iterator[RenderableType]":
    if not comparison.same_machine:
        yield f"{comparison.baseline} is from another machine ({comparison.difference}): only ratios are compared"
    if comparison.busy:
        yield Text("one of the two ran on a busy machine, which may explain a change", "yellow")
    if not comparison.changes:
        yield "nothing is comparable: ratios need a bench with PyTorch"
        return
    ordered = sorted(comparison.changes, key=lambda change: -change.worse)
    worse = f"{len(comparison.regressions)} of {len(ordered)} measurements got worse"
    table = _table(f"Compared with {comparison.baseline}: {worse}", "", "before", "now", "change")
    for change in ordered[:CHANGES_SHOWN]:
        table.add_row(change.measurement, f"{change.before:.4g}", f"{change.after:.4g}", _change(change))
    yield table


def _change(change: Change) -> Text | str:
    percent = f"{100 * (change.after / change.before - 1):+.1f} %" if change.before else ""
    if change.is_regression:
        return Text(f"{percent} worse", "red")
    return f"{percent} better" if change.worse < -max(TOLERANCE, change.spread) else f"{percent} within the spread"


# -- words


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _milliseconds(samples: Samples | None) -> str:
    return "" if samples is None else f"{1000 * samples.median:,.1f} ({1000 * samples.p90:,.1f})"


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f})"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"
