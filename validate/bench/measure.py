"""``wan-trt bench``: what engines cost in time and memory, beside PyTorch in the same run.

The order: memory of every piece, in processes of their own; then every piece on all sides in turns; then whole runs,
in turns as well.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.arrays import F32
from runtime.pipeline import Pipeline
from validate.bench.compare import check_comparable, compare
from validate.bench.costs import costs_of, peak_of
from validate.bench.footprint import Footprint, FootprintJob, footprint
from validate.bench.machine import Nvml, load_average, machine, versions
from validate.bench.our_side import OurSide
from validate.bench.read import read_bench
from validate.bench.report import BenchReport, Criteria
from validate.bench.result import REGRESSIONS, BenchResult, Piece, known_measurements
from validate.bench.samples import Samples, in_turns, measure_time
from validate.bench.whole_run import Run, Runs
from validate.bench.whole_run import in_turns as events_in_turns
from validate.bench.work import COMPILED, EAGER, OURS, RUN, BenchOptions, Side, Work, runner, work_for
from validate.gate import judge, read_gates
from validate.reference.device import Device, reference_device
from wan22.bundle import Bundle, open_bundle
from wan22.errors import NonFiniteError, UserError
from wan22.progress import Progress, silent
from wan22.residency import ONE_EXPERT

NEW_PROMPTS = 3  # measure_time forwards that are the first of their prompt
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")  # recorded: it decides how fast it is


def bench(
    engines: Path,
    checkpoint: str | Path | None = None,
    options: BenchOptions | None = None,
    progress: Progress = silent,
    criteria: Criteria | None = None,
) -> BenchReport:
    """Measures the engine bundle at ``engines``, beside PyTorch where the ``checkpoint`` it came from is given.

    Returns:
        The report, true when every gate of ``criteria`` was passed.

    Raises:
        UserError: no engines, engines of another checkpoint, a request that they cannot serve, a piece that there is
            not, torch.compile without a checkpoint or compiler, a GPU for PyTorch that it does not see, a gate file or
            baseline that cannot be used. All before any work. A GPU that is too small for PyTorch shows later.
    """
    options, criteria = options or BenchOptions(), criteria or Criteria()
    with open_bench(engines, checkpoint, options, progress) as setting:
        bundle, work = setting.pipeline.bundle, setting.work
        gates = () if criteria.gate is None else read_gates(criteria.gate, "bench", known_measurements(work.spec))
        baseline = None if criteria.baseline is None else read_bench(criteria.baseline, "baseline")
        if criteria.baseline and baseline:
            check_comparable(criteria.baseline, baseline, facts(work, bundle))
        result = setting.measure()
    compared = compare(criteria.baseline, baseline, result) if criteria.baseline and baseline else None
    measured = result.measurements() | ({REGRESSIONS: len(compared.regressions)} if compared else {})
    return BenchReport(result, compared, judge(gates, measured))


@contextmanager
def open_bench(
    engines: Path, checkpoint: str | Path | None, options: BenchOptions, progress: Progress
) -> Iterator["BenchRun"]:
    if options.compiled and checkpoint is None:
        raise UserError("torch.compile without a checkpoint", "the checkpoint of the engines", "name it after them")
    if checkpoint is None and options.reference_device != "auto":
        raise UserError("--reference-device without a checkpoint", "one for PyTorch", "name it after the engines")
    with Pipeline(open_bundle(engines, "engines"), residency=options.residency, choices=ONE_EXPERT) as pipeline:
        work = work_for(pipeline.bundle, options)
        if checkpoint is None:
            yield BenchRun(pipeline, work, None, options, progress)
            return
        device = reference_device(options.reference_device, pipeline.bundle.manifest)
        yield BenchRun(pipeline, work, str(checkpoint), options, progress, device)


@dataclass(frozen=True)
class BenchRun:
    """What a bench works with. The pipeline keeps one expert at a time."""

    pipeline: Pipeline
    work: Work
    checkpoint: str | None
    options: BenchOptions
    progress: Progress
    device: Device = "cpu"  # of PyTorch's sides

    def measure(self) -> BenchResult:
        bundle, work = self.pipeline.bundle, self.work
        chosen, load = work.select_pieces(self.options.only), load_average()
        sides = self.sides()
        peak, costs = peak_of(bundle), costs_of(work, bundle)
        measured = [*chosen, *([RUN] if self.options.whole_runs else [])]
        memory = {name: self._footprints(name, done, len(measured)) for done, name in enumerate(measured, 1)}
        times = [self.times(name, sides, done / len(chosen)) for done, name in enumerate(chosen, 1)]
        runs, stopped = self._whole_runs(sides)
        pieces = tuple(
            Piece(name, cost=costs[name], roofline_s=costs[name].roofline_s(peak), memory=memory[name], **vars(found))
            for name, found in zip(chosen, times, strict=True)
        )
        conditions = conditions_of(bundle, self.options) | {"load_average": [load, load_average()]}
        conditions |= {"reference_device": self.device if self.checkpoint else ""}
        used = memory.get(RUN, {})
        return BenchResult(facts(work, bundle), machine(), conditions, peak, pieces, runs, stopped, used)

    def sides(self) -> dict[str, Side]:
        """Ours, then PyTorch's where there is a checkpoint. Raises UserError for another model's checkpoint."""
        ours: dict[str, Side] = {OURS: OurSide(self.pipeline, self.work)}
        if self.checkpoint is None:
            return ours
        from validate.bench.torch_side import TorchSide, check_compiles
        from validate.reference.loras import with_loras
        from validate.same_model import open_same_model

        bundle = self.pipeline.bundle
        found = open_same_model(self.checkpoint, bundle.folder, bundle.manifest, self.progress)
        source = with_loras(found, bundle.manifest)
        names = (EAGER, *([COMPILED] if self.options.compiled else []))
        theirs = {
            name: TorchSide(source, bundle.manifest, self.work, compiled=name == COMPILED, device=self.device)
            for name in names
        }
        if COMPILED in theirs:
            check_compiles(theirs[COMPILED].device)
        return {**ours, **theirs}

    def _footprints(self, piece: str, done: int, total: int) -> dict[str, Footprint]:
        """By side; of the experts, which are alike, the first speaks for both. None of a run that stops at a NaN."""
        if not self.options.memory or piece in self.work.spec.experts[1:]:
            return {}
        beside = [] if self.checkpoint is None else [EAGER]
        beside += [COMPILED] if self.options.compiled and piece != RUN else []
        folder, found = self.pipeline.bundle.folder, {}
        with suppress(NonFiniteError):
            for side in (OURS, *beside):
                found[side] = footprint(FootprintJob(side, piece, folder, self.checkpoint, self.options))
        self.progress("measure memory", done, total, "pieces")
        return found

    def times(self, piece: str, sides: Mapping[str, Side], share: float) -> "Times":
        """``share`` of all pieces is done with this one."""
        results, first = {}, {}
        for name, side in sides.items():
            side.open(piece)
            chunks, first[name] = measure_time(partial(_all, side, piece))
            results[name] = side.join(chunks)
        runners = {name: runner(side, piece) for name, side in sides.items()}
        for run in [*runners.values()] * (self.options.warmup - 1):
            run()
        side = sides[OURS]
        graph_seconds = side.graph_seconds if isinstance(side, OurSide) else {}
        graph_seconds.clear()
        samples = in_turns(runners, self.options.runs, _counter())
        graphs = {name: Samples(tuple(seconds)) for name, seconds in graph_seconds.items()}
        new_prompt = self._new_prompts(piece, side, {EAGER: runners[EAGER]} if EAGER in runners else {})
        self.progress("measure time", round(100 * share), 100, "%")
        return Times(samples, first, *differences(results), graphs, new_prompt)

    def _new_prompts(self, piece: str, ours: Side, beside: Mapping[str, Callable[[], None]]) -> dict[str, Samples]:
        """By side, where a forward of ours takes longer when it is the first of its prompt."""
        forward = ours.new_prompt(piece) if isinstance(ours, OurSide) else None
        return in_turns({OURS: forward, **beside}, min(self.options.runs, NEW_PROMPTS)) if forward else {}

    def _whole_runs(self, sides: Mapping[str, Side]) -> tuple[dict[str, Runs], str | None]:
        """The runs, or none and what stopped them."""
        try:
            return self.whole_runs(sides, self.options.whole_runs), None
        except NonFiniteError as error:
            return {}, str(error)

    def whole_runs(self, sides: Mapping[str, Side], count: int) -> dict[str, Runs]:
        """By side; torch.compile is left out, it would compile anew whenever an expert is loaded.

        Raises:
            NonFiniteError: a side computed NaN or infinity.
        """
        sides = {name: side for name, side in sides.items() if name != COMPILED}
        found: dict[str, list[Run]] = {name: [] for name in sides}
        for done in range(count):
            for side in sides.values():
                side.close()
            step = self._event_counter(done, count)
            for name, run in events_in_turns({name: side.run() for name, side in sides.items()}, step).items():
                found[name].append(run)
        return {name: Runs(tuple(runs)) for name, runs in found.items() if runs}

    def _event_counter(self, done: int, total: int) -> Callable[[], None]:
        """Moves the bar when an event of whole run ``done`` is over."""
        work = self.work
        expected = len(work.spec.components) + 2 + work.request.steps + work.latents.shape[2]
        events = itertools.count(1)

        def over() -> None:
            share = min(next(events) / expected, 1.0)
            self.progress("whole runs", round(100 * (done + share) / total), 100, "%")

        return over


@dataclass(frozen=True)
class Times:
    """Of one piece: by side, and by graph of ours."""

    samples: Mapping[str, Samples]
    first_s: Mapping[str, float]
    difference: Mapping[str, float]
    not_finite: tuple[str, ...]
    graphs: Mapping[str, Samples]
    new_prompt: Mapping[str, Samples]


def facts(work: Work, bundle: Bundle) -> dict[str, Any]:
    """What was computed; runs compare where all of it is equal."""
    request = work.request
    return {
        "model": work.spec.name,
        "precision": str(bundle.manifest.precision),
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "tokens": work.tokens,
        "prompt_tokens": int(work.token_ids.shape[1]),
        "steps": request.steps,
        "guided": request.guided,
    }


def _all(side: Side, piece: str) -> list[Any]:
    return list(side.chunks(piece))


def conditions_of(bundle: Bundle, options: BenchOptions) -> dict[str, Any]:
    """What times depend on beside the machine."""
    build = bundle.manifest.build
    return {
        "command": options.command,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "target": build.target if build else "",
        "backend": f"{build.backend} {build.backend_version}" if build else "",
        "runs": options.runs,
        "warmup": options.warmup,
        "versions": versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _counter() -> Callable[[], float | None]:
    """Reads the joules that the GPU has spent; always None without one."""
    gpu = Nvml.open()
    return gpu.joules if gpu else lambda: None


def differences(results: Mapping[str, F32]) -> tuple[dict[str, float], tuple[str, ...]]:
    """How far results of the same work are from ours, relative L2 by side, and the sides with NaN or infinity.

    A side that is not finite has no distance; where it is ours, no side has.
    """
    not_finite = tuple(name for name, result in results.items() if not np.isfinite(result).all())
    if OURS in not_finite:
        return {}, not_finite
    others = (name for name in results if name not in (OURS, *not_finite))
    return {name: relative_l2(results[OURS], results[name]) for name in others}, not_finite


def relative_l2(found: F32, expected: F32) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
