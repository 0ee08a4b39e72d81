"""``wan-trt bench``: time and memory of engines, compared with PyTorch in the same run.

It measures, in this order: the memory of every piece, in child processes; the time of every piece, the sides taking
turns; the time of end-to-end runs, the sides taking turns again.
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
from validate.bench.costs import costs_of, peak_of
from validate.bench.footprint import Footprint, FootprintJob, footprint
from validate.bench.machine import Nvml, load_average, machine, versions
from validate.bench.our_side import OurSide
from validate.bench.report import BenchReport, Criteria, check_comparable, compare
from validate.bench.result import REGRESSIONS, BenchResult, Piece, known_measurements, read_bench
from validate.bench.samples import Samples, in_turns, measure_time
from validate.bench.step_cache import time_cache
from validate.bench.whole_run import Run, Runs
from validate.bench.whole_run import in_turns as events_in_turns
from validate.bench.work import COMPILED, EAGER, OURS, RUN, BenchOptions, Side, Work, runner, work_for
from validate.gate import judge, read_gates
from validate.reference.device import Device, reference_device
from wan22.bundle import Bundle, open_bundle
from wan22.errors import NonFiniteError, UserError
from wan22.progress import Progress, silent
from wan22.residency import ONE_EXPERT

NEW_PROMPTS = 3  # timed forwards with a new prompt
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")  # recorded because it affects speed


def bench(
    engines: Path,
    checkpoint: str | Path | None = None,
    options: BenchOptions | None = None,
    progress: Progress = silent,
    criteria: Criteria | None = None,
) -> BenchReport:
    """Measure the engine bundle at ``engines``, and PyTorch as well if its ``checkpoint`` is given.

    Returns:
        The report, true if every gate of ``criteria`` holds and the timings can be trusted.

    Raises:
        UserError: the engines, checkpoint, request, pieces, gate file or baseline are invalid or do not fit together;
            torch.compile lacks a checkpoint or compiler; or PyTorch does not see the GPU. All of this is checked
            before any work. Only a GPU that is too small for PyTorch is found later.
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
        what = "torch.compile without a checkpoint"
        raise UserError(what, "the checkpoint of the engines", "name it after the engines")
    if checkpoint is None and options.reference_device != "auto":
        raise UserError("--reference-device without a checkpoint", "one for PyTorch", "name it after the engines")
    bundle, how = open_bundle(engines, "engines"), options.residency
    with Pipeline(bundle, residency=how, choices=ONE_EXPERT, blocks=options.blocks) as pipeline:
        pipeline.fit(options.complete_request(pipeline.bundle.manifest).video)
        work = work_for(pipeline.bundle, options)
        if checkpoint is None:
            yield BenchRun(pipeline, work, None, options, progress)
            return
        device = reference_device(options.reference_device, pipeline.bundle.manifest)
        yield BenchRun(pipeline, work, str(checkpoint), options, progress, device)


@dataclass(frozen=True)
class BenchRun:
    """An open bench. The pipeline keeps one expert at a time."""

    pipeline: Pipeline
    work: Work
    checkpoint: str | None
    options: BenchOptions
    progress: Progress
    device: Device = "cpu"  # of the PyTorch sides

    def measure(self) -> BenchResult:
        bundle, work = self.pipeline.bundle, self.work
        chosen, load = work.select_pieces(self.options.only), load_average()
        sides = self.sides()
        peak, costs = peak_of(bundle), costs_of(work, bundle)
        measured = [*chosen, *([RUN] if self.options.whole_runs else [])]
        memory = {name: self._footprints(name, done, len(measured)) for done, name in enumerate(measured, 1)}
        times = [self.times(name, sides, done / len(chosen)) for done, name in enumerate(chosen, 1)]
        runs: dict[str, Runs] = {}
        stopped = None
        try:
            runs = self.whole_runs(sides, self.options.whole_runs)
        except NonFiniteError as error:
            stopped = str(error)
        pieces = tuple(
            Piece(name, cost=costs[name], roofline_s=costs[name].roofline_s(peak), memory=memory[name], **vars(found))
            for name, found in zip(chosen, times, strict=True)
        )
        conditions = conditions_of(bundle, self.options) | {"load_average": [load, load_average()]}
        conditions |= {"reference_device": self.device if self.checkpoint else ""}
        used, cache = memory.get(RUN, {}), None
        if work.cached is not None and stopped is None:
            for side in sides.values():
                side.close()
            cache = time_cache(self.pipeline, work, max(1, self.options.whole_runs), self.progress)
        return BenchResult(facts(work, bundle), machine(), conditions, peak, pieces, runs, stopped, used, cache)

    def sides(self) -> dict[str, Side]:
        """Our side and, with a checkpoint, PyTorch's. Raises UserError for a checkpoint of another model."""
        ours: dict[str, Side] = {OURS: OurSide(self.pipeline, self.work)}
        if self.checkpoint is None:
            return ours
        from validate.bench.torch_side import TorchSide, check_compiles
        from validate.reference.checkpoint import open_same_model

        bundle = self.pipeline.bundle
        source = open_same_model(self.checkpoint, bundle.folder, bundle.manifest, self.progress)
        side = partial(TorchSide, source, bundle.manifest, self.work, device=self.device)
        if not self.options.compiled:
            return {**ours, EAGER: side()}
        compiled = side(compiled=True)
        check_compiles(compiled.device)
        return {**ours, EAGER: side(), COMPILED: compiled}

    def _footprints(self, piece: str, done: int, total: int) -> dict[str, Footprint]:
        """Memory by side, only for the first of two equal experts. A run that stops at a NaN has none."""
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
        """Time ``piece`` on all sides; ``share`` of all pieces is then done."""
        results, first = {}, {}
        for name, side in sides.items():
            side.open(piece)
            measured: tuple[list[Any], float] = measure_time(partial(list, side.chunks(piece)))
            results[name], first[name] = side.join(measured[0]), measured[1]
        runners = {name: runner(side, piece) for name, side in sides.items()}
        for run in [*runners.values()] * (self.options.warmup - 1):
            run()
        ours, gpu = sides[OURS], Nvml.open()
        assert isinstance(ours, OurSide)
        ours.graph_seconds.clear()
        samples = in_turns(runners, self.options.runs, gpu.joules if gpu else lambda: None)
        graphs = {name: Samples(tuple(seconds)) for name, seconds in ours.graph_seconds.items()}
        new_prompt: dict[str, Samples] = {}  # stays empty if a new prompt takes our side no longer
        if forward := ours.new_prompt(piece):
            beside = {EAGER: runners[EAGER]} if EAGER in runners else {}
            new_prompt = in_turns({OURS: forward, **beside}, min(self.options.runs, NEW_PROMPTS))
        self.progress("measure time", round(100 * share), 100, "%")
        return Times(samples, first, *differences(results), graphs, new_prompt)

    def whole_runs(self, sides: Mapping[str, Side], count: int) -> dict[str, Runs]:
        """End-to-end runs by side, without torch.compile, which compiles again whenever an expert is loaded.

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
        """A callback that advances the progress after each event of end-to-end run ``done``."""
        work = self.work
        expected = len(work.spec.components) + 2 + work.request.steps + work.latents.shape[2]
        events = itertools.count(1)

        def after_event() -> None:
            share = min(next(events) / expected, 1.0)
            self.progress("whole runs", round(100 * (done + share) / total), 100, "%")

        return after_event


@dataclass(frozen=True)
class Times:
    """The times of one piece by side, and by graph of our side."""

    samples: Mapping[str, Samples]
    first_s: Mapping[str, float]
    difference: Mapping[str, float]
    not_finite: tuple[str, ...]
    graphs: Mapping[str, Samples]
    new_prompt: Mapping[str, Samples]


def facts(work: Work, bundle: Bundle) -> dict[str, Any]:
    """The work that was measured. Benches are comparable only if all of it agrees."""
    request = work.request
    return {
        "model": work.spec.name,
        "precision": bundle.manifest.precision_text,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "tokens": work.tokens,
        "prompt_tokens": int(work.token_ids.shape[1]),
        "steps": request.steps,
        "guided": request.guided,
    }


def conditions_of(bundle: Bundle, options: BenchOptions) -> dict[str, Any]:
    """Everything except the machine that affects times."""
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


def differences(results: Mapping[str, F32]) -> tuple[dict[str, float], tuple[str, ...]]:
    """The distance of each side's result from ours (relative L2), and the sides with NaN or infinity.

    A side that is not finite has no distance. If ours is not finite, no side has one.
    """
    not_finite = tuple(name for name, result in results.items() if not np.isfinite(result).all())
    if OURS in not_finite:
        return {}, not_finite
    ours, others = results[OURS], {name: results[name] for name in results if name not in (OURS, *not_finite)}
    norm = np.linalg.norm
    return {name: float(norm(ours - other) / norm(other)) for name, other in others.items()}, not_finite
