"""Scaling of time: the same work at several lengths, sizes or numbers of steps, and the exponent of growth.

The exponent is the slope of a straight line through the logarithms: 1 is linear, 2 is attention alone. A transformer's
work grows with its tokens, a VAE's with the pixels: the first latent frame is one frame and every later one is four, so
the exponent of linear work over tokens would be above 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from validate.bench.machine import load_average, machine
from validate.bench.measure import BenchRun, conditions_of, open_bench
from validate.bench.result import faults_of
from validate.bench.work import DECODER, BenchOptions
from wan22.errors import UserError
from wan22.progress import Progress, silent
from wan22.shapes import parse_size
from wan22.specs import ModelSpec

Axis = Literal["frames", "size", "steps"]
FORMAT = "wan-trt sweep 1"
FRAMES, STEPS, SHARES = (5, 9, 17, 33), (2, 4, 8), (0.5, 0.75, 1.0)  # unless values are given


@dataclass(frozen=True)
class Point:
    x: int  # tokens, or steps
    label: str  # the value swept: "17" frames, "256x160"
    seconds: dict[str, float]  # by series, such as "high_noise, ours"
    pixels: int = 0  # of all frames


@dataclass(frozen=True)
class Sweep:
    axis: Axis
    model: str
    points: tuple[Point, ...]
    precision: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)  # command, versions, load
    faults: tuple[str, ...] = ()  # reasons not to trust the timings

    @property
    def unit(self) -> str:
        return "steps" if self.axis == "steps" else "tokens"

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(self.points[0].seconds)

    def grows_with(self, name: str) -> str:
        """The x axis of a series' fit: "steps", "tokens" or "pixels"."""
        return "pixels" if self.axis != "steps" and name.startswith("vae_") else self.unit

    def amounts(self, name: str) -> list[int]:
        """Steps, tokens or pixels of every point."""
        return [point.pixels if self.grows_with(name) == "pixels" else point.x for point in self.points]

    def exponents(self) -> dict[str, float]:
        """The exponent of every series that has at least two different amounts."""
        return {name: self.fit(name)[0] for name in self.series if len(set(self.amounts(name))) > 1}

    def fit(self, name: str) -> tuple[float, float]:
        """Fit ``seconds = a · amount ** b``; returns ``b, a``."""
        x = np.array(self.amounts(name), np.float64)
        seconds = np.array([point.seconds[name] for point in self.points])
        slope, intercept = np.polyfit(np.log(x), np.log(seconds), 1)
        return float(slope), float(np.exp(intercept))

    def as_json(self) -> dict[str, Any]:
        points = [
            {self.axis: p.label if self.axis == "size" else int(p.label), self.unit: p.x}
            | ({} if self.axis == "steps" else {"pixels": p.pixels})
            | {"seconds": p.seconds}
            for p in self.points
        ]
        return {
            "format": FORMAT,
            "model": self.model,
            "precision": self.precision,
            "axis": self.axis,
            "machine": dict(self.machine),
            "conditions": dict(self.conditions),
            "points": points,
            "exponents": self.exponents(),
            "exponents_of": {name: self.grows_with(name) for name in self.exponents()},
            "faults": list(self.faults),
        }


def sweep(
    engines: Path,
    checkpoint: str | Path | None,
    axis: Axis,
    values: Sequence[str] | None = None,
    options: BenchOptions | None = None,
    progress: Progress = silent,
) -> Sweep:
    """Bench ``values`` of ``axis``, or the default values, with otherwise the same ``options``.

    Raises:
        UserError: as ``bench``, or a value is invalid. All values are checked before any work.
    """
    options = replace(options or BenchOptions(), memory=False)
    if axis == "steps" and options.only:
        raise UserError("--only with a sweep of steps", "end-to-end runs, which use all pieces", "omit --only")
    with open_bench(engines, checkpoint, options, progress) as setting:
        chosen = options_of(axis, values, options, setting.work.spec)
        for each in chosen.values():
            setting.pipeline.fit(each.complete_request(setting.pipeline.bundle.manifest).video)
        manifest, load = setting.pipeline.bundle.manifest, load_average()
        conditions = conditions_of(setting.pipeline.bundle, options)
    points: list[Point] = []
    faults: list[str] = []
    for done, (label, each) in enumerate(chosen.items(), 1):
        with open_bench(engines, checkpoint, each, silent) as setting:
            if axis == "steps":  # raises NonFiniteError if a side computes NaN
                runs = setting.whole_runs(setting.sides(), max(1, each.whole_runs))
                seconds = {f"all steps, {side}": found.figures()["denoise_s"] for side, found in runs.items()}
            else:
                seconds, faulty = _piece_seconds(setting)
                faults += [f"{axis} {label}, {fault}" for fault in faulty]
            request = setting.work.request
            pixels = request.width * request.height * request.frames
            points.append(Point(request.steps if axis == "steps" else setting.work.tokens, label, seconds, pixels))
        progress(f"sweep {axis}", done, len(chosen), "points")
    conditions |= {"load_average": [load, load_average()]}
    described = (manifest.precision_text, machine(), conditions)
    return Sweep(axis, manifest.spec.name, tuple(points), *described, tuple(faults))


def _piece_seconds(setting: BenchRun) -> tuple[dict[str, float], list[str]]:
    """Median times of an expert and the decoder, or of the selected pieces; and their faults."""
    sides, spec = setting.sides(), setting.work.spec
    pieces = setting.work.select_pieces(setting.options.only or (spec.experts[0], DECODER))
    found: dict[str, float] = {}
    faults: list[str] = []
    for piece in pieces:
        times = setting.times(piece, sides, 1.0)
        found |= {f"{piece}, {side}": samples.median for side, samples in times.samples.items()}
        faults += faults_of(piece, times.not_finite, times.difference)
    return found, faults


def options_of(
    axis: Axis, values: Sequence[str] | None, options: BenchOptions, spec: ModelSpec
) -> dict[str, BenchOptions]:
    """Options by label. Raises UserError for an invalid value of ``axis`` or fewer than two values."""
    labels = _defaults(axis, options, spec) if values is None else list(dict.fromkeys(values))
    if len(labels) < 2:
        raise UserError(f"a sweep over {labels[0] or 'nothing'}", "at least two values", "give more with --values")
    chosen: dict[str, Any] = {label: parse_size(label) if axis == "size" else _number(axis, label) for label in labels}
    return {label: replace(options, request=replace(options.request, **{axis: x})) for label, x in chosen.items()}


def _defaults(axis: Axis, options: BenchOptions, spec: ModelSpec) -> list[str]:
    if axis != "size":
        return [str(value) for value in (FRAMES if axis == "frames" else STEPS)]
    width, height = options.request.size or spec.sampling.sizes[0]
    grid = spec.size_multiple
    sizes = [[max(grid, round(side * share / grid) * grid) for side in (width, height)] for share in SHARES]
    return list(dict.fromkeys(f"{w}x{h}" for w, h in sizes))


def _number(axis: Axis, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{axis} {text!r}", "positive integers separated by commas", "write them as 5,9,17")
    return int(text)
