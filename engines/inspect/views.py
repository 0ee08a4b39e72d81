"""Show a fusion report as a table in the terminal, or as a web page with a diagram of one block."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from engines.inspect.log import Kernel
from engines.inspect.report import EVERY_BLOCK, FusionReport
from wan22.quantities import human_bytes

TEMPLATES = Path(__file__).parent / "templates"
NARROWEST_BAR, WIDEST_BAR = 2.0, 100.0  # per cent


def as_text(report: FusionReport) -> list[RenderableType]:
    """The terminal output for one component: counts, then the kernels of a typical block."""
    return [_counts(report), *([_kernels(report)] if report.typical_block else [])]


def problems_as_text(reports: Sequence[FusionReport]) -> list[Text]:
    """A line for each problem, with its component: what the terminal shows last, and so in sight."""
    named = [f"problem: {report.component}: {problem}" for report in reports for problem in report.problems]
    return [Text(line, style="bold red") for line in named]


def blocks_as_text(reports: Sequence[FusionReport]) -> Iterator[str]:
    """Yield a line for each component in stages, and for each form of it: what a step runs of every block.

    A stage without a form for several devices was compiled for all tokens: of it a device has its share.
    """
    forms: dict[tuple[str, str], list[FusionReport]] = {}
    for report in (r for r in reports if r.is_block and not r.component.endswith(".text_kv")):
        component, _, stage = report.component.rpartition(".")
        forms.setdefault((component, stage.partition("_of_")[2]), []).append(report)
    for (component, devices), own in forms.items():
        what = f"{component} on one of {devices} devices" if devices else component
        formed = {report.component.partition("_of_")[0] for report in own}
        shared = [r for r in forms[component, ""] if r.component not in formed] if devices else []
        parts = [*((report, 1) for report in own), *((report, int(devices)) for report in shared)]
        scratch = ", ".join(human_bytes(report.compiled.scratch_bytes / share, 0) for report, share in parts)
        names = " + ".join(report.component.rpartition(".")[2] for report, _ in parts)
        kernels = " + ".join(str(len(report.compiled.kernels)) for report, _ in parts)
        seconds = sum(report.total(report.typical_block) / share for report, share in parts)
        yield (
            f"{what}: a block is {names}, {kernels} kernels, {seconds * 1e3:.2f} ms by roofline; "
            f"{own[0].blocks_in_model} blocks {seconds * own[0].blocks_in_model:.3f} s; scratch memory {scratch}"
        )


def as_html(reports: Sequence[FusionReport], title: str) -> str:
    """A self-contained page; the length of a kernel's bar is its roofline time."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    legends = [list(dict.fromkeys(kernel.role for kernel in r.typical_block)) for r in reports]
    both = zip(reports, legends, strict=True)
    parts = [{"summary": r.summary(), "flow": _flow(r), "roles": roles} for r, roles in both]
    return environment.get_template("fusion.html.j2").render(title=title, parts=parts, human_bytes=human_bytes)


def by_dtype(counts: dict[str, int]) -> str:
    """``{"fp8": 7, "bf16": 2}`` → "7 fp8, 2 bf16"."""
    return ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"


def _counts(report: FusionReport) -> Table:
    s = report.summary()
    title = f"{s['component']} for {s['target']}, {s['precision']}"
    table = Table(title=title, show_header=False, title_justify="left")
    left_out = f", {s['blocks_left_out']} identical ones left out" if s["blocks_left_out"] else ""
    if report.is_block:
        left_out = f", for all {report.blocks_in_model}" if report.blocks_in_model else ""
    in_blocks = bool(s["blocks_compiled"])
    gemms, of_block = by_dtype(s["gemms"]), f"; {s['gemms_per_block']} per block" if in_blocks else ""
    roofline_block = f", {s['roofline_block_s'] * 1e3:.2f} ms per block" if in_blocks else ""
    rows = {
        **({"weights": s["weights"]} if s["weights"] else {}),
        **({"blocks compiled": f"{s['blocks_compiled']}{left_out}"} if in_blocks else {}),
        "kernels": f"{s['kernels']}, {s['kernels_per_block']} per block" if s["kernels_per_block"] else s["kernels"],
        "matrix multiplications": f"{gemms}{of_block}",
        "attention kernels": by_dtype(s["attention"]),
        "convolutions": by_dtype(s["convolutions"]),
        "elementwise, copies": f"{s['elementwise']}, {s['copies']} ({len(s['copies_over_64_mib'])} over 64 MiB)",
        "scratch, weights": f"{human_bytes(s['scratch_bytes'])}, {human_bytes(s['weights_bytes'])}",
        "arithmetic": f"{s['tflop']:.2f} TFLOP",
        "roofline": f"{s['roofline_s'] * 1e3:.1f} ms{roofline_block}",
    }
    if open_sizes := s["kernels_of_open_sizes"]:
        rows |= dict.fromkeys(("arithmetic", "roofline"), f"unknown: sizes of {open_sizes} kernels are the run's")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _kernels(report: FusionReport) -> Table:
    headings = ("kernel", "what it computes", "type", "GFLOP", "bytes", "roofline")
    table = Table(*headings, title=EVERY_BLOCK if report.is_block else report.typical_block[0].block)
    for row in _rows(report):
        style = {"copy": "yellow", "attention": "cyan", "gemm": "green"}.get(row["role"], "")
        table.add_row(row["role"], row["what"], row["dtypes"], row["gflop"], row["bytes"], row["time"], style=style)
    return table


def _rows(report: FusionReport) -> list[dict[str, str]]:
    rows = []
    for kernel in report.typical_block:
        seconds = report.seconds(kernel)
        entering, leaving = (dict.fromkeys(o.dtype for o in side) for side in (kernel.inputs, kernel.outputs))
        row = {"role": kernel.role, "what": _what(kernel), "dtypes": f"{', '.join(entering)} → {', '.join(leaving)}"}
        row |= {"gflop": f"{kernel.flops / 1e9:,.0f}" if kernel.flops else "", "bytes": human_bytes(kernel.size_bytes)}
        rows.append(row | {"time": "" if seconds is None else f"{seconds * 1e3:.3f} ms"})
    return rows


def _flow(report: FusionReport) -> list[dict[str, str]]:
    """The kernels of a typical block, with bar lengths in per cent of the longest."""
    times = [report.seconds(kernel) or 0.0 for kernel in report.typical_block]
    longest = max(times, default=0.0) or 1.0
    widths = [max(NARROWEST_BAR, WIDEST_BAR * time / longest) for time in times]
    return [row | {"width": f"{width:.1f}"} for row, width in zip(_rows(report), widths, strict=True)]


def _what(kernel: Kernel) -> str:
    """The modules inside the kernel, without the block's name: ``self_attn/norm_qk + self_attn/rope``."""
    working = ("MatMul", "Gemm", "Softmax", "Attention", "Gelu", "Conv")
    inside = [node.removeprefix(f"{kernel.block}/") for node in kernel.nodes if node.startswith(kernel.block)]
    if kernel.role in ("gemm", "attention"):  # do not list the quantisation around them separately
        inside = [node for node in inside if node.split("/")[-1].rstrip("_0123456789") in working]
    modules = dict.fromkeys(node.rpartition("/")[0] for node in inside)
    return " + ".join(module for module in modules if module) or kernel.name
