"""What lower precision, step caches and fewer steps cost, on the trained tiny model.

    python -m studies.tiny_model.quality OUT --prompts 100

The held-out prompts (prompt *n* with the noise of seed *n*) are rendered in every way of ``WAYS``. A clip is compared
with that of float32 with the same number of steps or the model's own, and the judge says whether it shows what the
prompt says. Graphs in 16 bits and fewer run as exported, in ONNX Runtime on the CPU; bfloat16 is emulated by rounding.
"Calibrated" exports, and that with branches of rank 32, use what was measured on captions that the model was trained
on. ``quality.json`` grows by a prompt at a time, so a command that was stopped goes on, with more prompts if it is
asked for more; ``strips`` has the frames of every prompt.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from engines.build import build_engines
from export.exporter import export_checkpoint
from export.options import ExportOptions
from export.synth.checkpoint import synthesise
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.video import to_uint8
from studies.tiny_model.clips import random_clip
from studies.tiny_model.evaluate import Rendered, held_out, render, strip
from studies.tiny_model.judge import judge
from studies.tiny_model.train_vae import MODEL
from validate.ladder.metrics import FRAME_RANGE, compare, ssim_per_frame
from validate.ladder.onnx_side import open_for_comparison
from wan22.caching import Caching
from wan22.errors import UserError
from wan22.files import claim, write_file
from wan22.precision import Precision
from wan22.progress import Progress
from wan22.quantities import counted
from wan22.specs import spec_named
from wan_trt.console import bars, console
from wan_trt.guard import command_of
from wan_trt.recipes.calibrate import CalibrateOptions, calibrate

PROGRAM = "python -m studies.tiny_model.quality"
RESULT, ENGINES, MEANS = "quality.json", "engines", "means.safetensors"
CALIBRATION_PROMPTS = 8
PARTS = ("colour", "shape", "motion", "right")
LABEL_WIDTH, COLOURS = 150, 64  # of a picture: pixels, and colours of its palette


@dataclass(frozen=True)
class Way:
    """One way to render a prompt; ``beside`` names the way that it is compared with."""

    name: str
    beside: str = "fp32"
    precision: Precision = Precision.FP32
    means: bool = False
    low_rank: int = 0
    request: Request = field(default_factory=Request)

    @property
    def bundle(self) -> str:
        means, rank = "-means" if self.means else "", f"-rank-{self.low_rank}" if self.low_rank else ""
        return f"{self.precision}{means}{rank}"


def _cached(name: str, **settings: Any) -> Way:
    return Way(name, "fp32, 40 steps", request=Request(steps=40, cache=Caching(**settings)))


WAYS = (
    Way("fp32"),
    Way("bf16", precision=Precision.BF16),
    Way("fp16", precision=Precision.FP16),
    Way("fp8", precision=Precision.FP8),
    Way("fp8, calibrated", precision=Precision.FP8, means=True),
    Way("fp8-attn", precision=Precision.FP8_ATTN),
    Way("int8", precision=Precision.INT8),
    Way("int8, calibrated", precision=Precision.INT8, means=True),
    Way("int8+fp8-attn", precision=Precision.INT8_FP8_ATTN),
    Way("nvfp4", precision=Precision.NVFP4),
    Way("nvfp4, calibrated", precision=Precision.NVFP4, means=True),
    Way("nvfp4, rank 32", precision=Precision.NVFP4, means=True, low_rank=32),
    Way("nvfp4-ffn", precision=Precision.NVFP4_FFN),
    Way("10 steps", request=Request(steps=10)),
    Way("6 steps", request=Request(steps=6)),
    Way("6 steps, dpm++", request=Request(steps=6, solver="dpm++")),
    Way("4 steps", request=Request(steps=4)),
    Way("4 steps, euler", request=Request(steps=4, solver="euler")),
    Way("fp32, 40 steps", request=Request(steps=40)),
    _cached("easy", easy=True),
    _cached("easy 0.2, 4 in a row", easy=True, threshold=0.2, max_consecutive=4),
    _cached("magcache", skip_steps="magcache"),
    _cached("magcache, taylor1", skip_steps="magcache", reuse="taylor1"),
    _cached("late-cfg", late_cfg="auto"),
)


def measured(clips: Mapping[str, Rendered], content: Any) -> dict[str, dict[str, Any]]:
    """By way: distances from the clip that it is compared with, what the judge says, forwards and seconds.

    ``psnr_db`` is that of the whole clip, None for equal ones; ``ssim`` is that of the worst frame.
    """
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        clip, beside = clips[way.name], clips[way.beside]
        verdict = judge(content, to_uint8(clip.frames))
        psnr = compare(clip.frames, beside.frames, signal_range=FRAME_RANGE).psnr_db
        found[way.name] = {
            "psnr_db": None if psnr is None or math.isinf(psnr) else round(psnr, 2),
            "ssim": round(min(ssim_per_frame(clip.frames, beside.frames)), 5),
            **{part: getattr(verdict, part) for part in PARTS},
            "seen": asdict(verdict.seen),
            "forwards": clip.forwards,
            "seconds": round(clip.seconds, 2),
        }
    return found


class Pipelines:
    """The pipelines of all ways, made in ``folder`` at first use and kept open."""

    def __init__(self, folder: Path, stack: ExitStack, progress: Progress) -> None:
        self._folder, self._stack, self._progress = folder, stack, progress
        self._open: dict[str, Pipeline] = {}

    def __getitem__(self, way: Way) -> Pipeline:
        if way.bundle not in self._open:
            opened = open_for_comparison(self._bundle(way), residency="all")
            self._open[way.bundle] = self._stack.enter_context(opened)
        return self._open[way.bundle]

    def _bundle(self, way: Way) -> Path:
        """Float32 as engines, everything else as the graphs of the export."""
        checkpoint, graphs = self._folder / "checkpoint", self._folder / way.bundle
        if not checkpoint.exists():
            synthesise(spec_named(MODEL), checkpoint, "official", 0, progress=self._progress)
        if not graphs.exists():
            means = self._means() if way.means else None
            options = ExportOptions(way.precision, input_means=means, low_rank=way.low_rank)
            export_checkpoint(str(checkpoint), graphs, options, self._progress)
        if way.precision != Precision.FP32:
            return graphs
        engines = self._folder / ENGINES
        if not engines.exists():
            build_engines(graphs, engines, progress=self._progress)
        return engines

    def _means(self) -> Path:
        means = self._folder / MEANS
        if not means.exists():
            captions = [random_clip(f"calibrated-{i}", held_out=False)[0].caption for i in range(CALIBRATION_PROMPTS)]
            prompts = self._folder / "prompts.txt"
            write_file(prompts, "\n".join(captions).encode())
            options = CalibrateOptions(prompts, means=means, overwrite=True)
            calibrate(self._folder / str(Precision.FP32), self._folder / "scales.json", options, self._progress)
        return means


def picture(clips: Mapping[str, Rendered]) -> Image.Image:
    """A strip of every way under another, with the ways' names, in few colours."""
    strips = [strip(to_uint8(clips[way.name].frames)) for way in WAYS]
    height, width = strips[0].shape[:2]
    shown = Image.new("RGB", (LABEL_WIDTH + width, height * len(strips)), "white")
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(13)
    for index, (way, pixels) in enumerate(zip(WAYS, strips, strict=True)):
        pen.text((6, height * (index + 0.5)), way.name, "black", font, anchor="lm")
        shown.paste(Image.fromarray(pixels), (LABEL_WIDTH, height * index))
    return shown.quantize(COLOURS, dither=Image.Dither.NONE)


def study(folder: Path, prompts: int, progress: Progress) -> dict[str, Any]:
    """Renders and judges the prompts that ``folder`` does not have yet; its result is up to date after each.

    Raises:
        UserError: the folder's result is of other ways or damaged, or another study writes there.
    """
    with claim(folder / RESULT, "the study") as claimed, ExitStack() as stack:
        result = _begun(folder / RESULT)
        pipelines, done = Pipelines(folder, stack, progress), len(result["prompts"])
        (folder / "strips").mkdir(exist_ok=True)
        for seed, content in list(enumerate(held_out(prompts)))[done:]:
            clips: dict[str, Rendered] = {}
            for way in WAYS:
                progress("quality", seed * len(WAYS) + len(clips), prompts * len(WAYS), "clips")
                clips[way.name] = render(pipelines[way], replace(way.request, prompt=content.caption, seed=seed))
            picture(clips).save(folder / "strips" / f"{seed:03}.png", optimize=True)
            result["prompts"].append({"prompt": content.caption, "ways": measured(clips, content)})
            claimed.new.write_text(json.dumps(result) + "\n")
            claimed.publish()
    return result


def _begun(path: Path) -> dict[str, Any]:
    """What an earlier run left in ``path``, or an empty result."""
    ways = {way.name: repr(way) for way in WAYS}
    if not path.exists() or not path.stat().st_size:
        return {"ways": ways, "prompts": []}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        same = found["ways"] == ways and isinstance(found["prompts"], list)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{path} of other ways to render", "a result of this version", "name another folder")
    return found


def table(result: Mapping[str, Any]) -> Table:
    """The ways with medians and worst values over all prompts, and the shares of clips that the judge finds right."""
    prompts = result["prompts"]
    shown = Table(
        "", "calls", "PSNR, dB", "SSIM", "right, %",
        title=f"{counted(len(prompts), 'prompt')}: medians, in brackets the worst clip",
        caption="calls: of a transformer; right: colour, shape, motion, and all three",
        title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for way in WAYS:
        clips = [prompt["ways"][way.name] for prompt in prompts]
        psnr = [math.inf if clip["psnr_db"] is None else clip["psnr_db"] for clip in clips]
        ssim = [clip["ssim"] for clip in clips]
        apart = f"{median(psnr):.1f} ({min(psnr):.1f})", f"{median(ssim):.4f} ({min(ssim):.4f})"
        right = ", ".join(f"{100 * np.mean([clip[part] for clip in clips]):.0f}" for part in PARTS)
        forwards = f"{np.mean([clip['forwards'] for clip in clips]):.0f}"
        shown.add_row(way.name, forwards, *(("", "") if way.name == way.beside else apart), right)
    return shown


def run(
    folder: Annotated[Path, typer.Argument(help="Folder of bundles, results and strips.", show_default=False)],
    prompts: Annotated[int, typer.Option(help="Held-out prompts to render in every way.", min=1, max=1000)] = 24,
) -> None:
    """Render held-out prompts in lower precision, with step caches and in fewer steps, and judge them."""
    try:
        with bars() as progress:
            study(folder, prompts, progress)
    finally:  # after Ctrl-C too, of what is finished
        path = folder / RESULT
        if path.exists() and path.stat().st_size and (result := _begun(path))["prompts"]:
            console.print(table(result))


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
