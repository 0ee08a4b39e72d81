"""The result of a bench, from which the table, the JSON, the gates and the comparison are made; and its JSON read back.

A *measurement* is a number with a name for gates and comparisons, such as ``high_noise.median_ms``. The name contains
the unit. ``speedup`` is PyTorch's time over ours, ``memory_ratio`` our peak memory over PyTorch's.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from validate.bench.costs import Cost, Peak
from validate.bench.footprint import Footprint
from validate.bench.samples import Ratio, Samples
from validate.bench.step_cache import MEASURED, SUBJECT, CacheTimes
from validate.bench.whole_run import Runs, step_ratio, total_ratio
from validate.bench.work import COMPILED, EAGER, OURS, RUN, pieces_of
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.specs import ModelSpec

FORMAT = "wan-trt bench 1"
FIELDS = {  # of the JSON, for later calculations
    **dict.fromkeys(("model", "precision"), str),
    **dict.fromkeys(("machine", "conditions", "pieces", "measurements"), dict),
    "faults": list,
    **dict.fromkeys(("width", "height", "frames", "tokens"), int),
}
OF_MEMORY = (
    "peak_host_bytes", "memory_ratio", "memory_ratio_beyond_libraries", "peak_device_bytes", "device_memory_ratio",
)  # fmt: skip
OF_A_PIECE = (
    "median_ms", "p90_ms", "cpu_median_ms", "energy_j", "roofline_percent",
    "speedup", "speedup_p10", "cpu_speedup", "speedup_compiled", "relative_l2",
    *OF_MEMORY,
)  # fmt: skip
OF_AN_EXPERT = ("new_prompt_median_ms", "new_prompt_speedup")
OF_A_RUN = (
    "total_s", "total_p90_s", "first_frame_s", "text_s", "image_s", "denoise_s", "decode_s", "open_s", "expert_swap_s",
    "streamed_step_bytes", "stream_hidden_step_ms", "stream_stall_step_ms", "switch_stall_ms",
    "vae_share_percent", "host_overhead_ms", "host_overhead_percent", "speedup", "step_speedup", "step_speedup_p10",
    *OF_MEMORY,
)  # fmt: skip
REGRESSIONS = "compare.regressions"
LARGEST = sys.float_info.max
REMEDY = "name the output of an earlier wan-trt bench"
APART = 0.1  # relative L2: above FP8's error on random weights, below that of a wrong weight or input


def known_measurements(spec: ModelSpec) -> tuple[str, ...]:
    """Every name that a bench of this model can measure, with or without an image."""
    pieces, alike = pieces_of(spec, has_image="vae_encoder_first" in spec.components), spec.experts[1:]
    names = [f"{piece}.{name}" for piece in pieces for name in OF_A_PIECE if not (piece in alike and name in OF_MEMORY)]
    names += [f"{expert}.{name}" for expert in spec.experts for name in OF_AN_EXPERT]
    names += [f"{RUN}.{name}" for name in OF_A_RUN]
    return (*names, *(f"{SUBJECT}.{name}" for name in MEASURED), REGRESSIONS)


def memory_measurements(memory: Mapping[str, Footprint]) -> Iterator[tuple[str, float | None]]:
    """Yield the memory measurements of the footprints by side."""
    ours, eager = memory.get(OURS), memory.get(EAGER)
    if ours is None:
        return
    yield from (("peak_host_bytes", ours.peak), ("peak_device_bytes", ours.device))
    if eager is not None:
        yield "memory_ratio", ours.peak / eager.peak
        yield "memory_ratio_beyond_libraries", ours.beyond_libraries / eager.beyond_libraries
        if ours.device and eager.device:
            yield "device_memory_ratio", ours.device / eager.device


def faults_of(piece: str, not_finite: Sequence[str], difference: Mapping[str, float]) -> Iterator[str]:
    """Yield the reasons not to trust the timings of ``piece``: NaN on a side, or sides with different work."""
    yield from (f"{piece}: NaN or infinity computed by {side}" for side in not_finite)
    for side, distance in difference.items():
        if distance > APART:
            yield f"{piece}: {side} is {distance:.2g} away from ours, so they did different work"


@dataclass(frozen=True)
class Piece:
    """The results of one piece by side."""

    name: str
    samples: Mapping[str, Samples]
    cost: Cost
    roofline_s: float | None
    first_s: Mapping[str, float] = field(default_factory=dict)  # the first run, in which torch.compile compiles
    difference: Mapping[str, float] = field(default_factory=dict)  # relative L2 of the other sides to ours
    not_finite: tuple[str, ...] = ()  # sides whose result has NaN or infinity
    memory: Mapping[str, Footprint] = field(default_factory=dict)
    graphs: Mapping[str, Samples] = field(default_factory=dict)  # times of our graphs if a piece has several calls
    new_prompt: Mapping[str, Samples] = field(default_factory=dict)  # times of forwards with a new prompt

    def ratio(self, side: str, *, new_prompt: bool = False) -> Ratio | None:
        """The time of ``side`` over ours; None if it did not run."""
        samples = self.new_prompt if new_prompt else self.samples
        return Ratio.of(samples[side].seconds, samples[OURS].seconds) if side in samples else None

    @property
    def roofline_percent(self) -> float | None:
        return None if self.roofline_s is None else 100 * self.roofline_s / self.samples[OURS].median

    def faults(self) -> Iterator[str]:
        """Yield the reasons not to trust the timings."""
        return faults_of(self.name, self.not_finite, self.difference)

    def measurements(self) -> Iterator[tuple[str, float | None]]:
        ours = self.samples[OURS]
        yield from (("median_ms", 1000 * ours.median), ("p90_ms", 1000 * ours.p90))
        yield from (("cpu_median_ms", ours.as_json().get("cpu_median_ms")), ("energy_j", ours.energy_j))
        yield "roofline_percent", self.roofline_percent
        if (eager := self.ratio(EAGER)) is not None:
            yield from (("speedup", eager.median), ("speedup_p10", eager.p10))
            yield "cpu_speedup", Ratio.of(self.samples[EAGER].cpu_seconds, ours.cpu_seconds).median
            yield "relative_l2", self.difference.get(EAGER)
        if self.new_prompt:
            yield "new_prompt_median_ms", 1000 * self.new_prompt[OURS].median
        if (anew := self.ratio(EAGER, new_prompt=True)) is not None:
            yield "new_prompt_speedup", anew.median
        if (compiled := self.ratio(COMPILED)) is not None:
            yield "speedup_compiled", compiled.median
        yield from memory_measurements(self.memory)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {side: samples.as_json() for side, samples in self.samples.items()}
        found |= {"flop": self.cost.total_flop, "flop_source": self.cost.source, "bytes": self.cost.bytes}
        if self.roofline_s is not None:
            found |= {"roofline_ms": 1000 * self.roofline_s, "roofline_percent": self.roofline_percent}
        found["speedup"] = {side: vars(ratio) for side in self.samples if side != OURS and (ratio := self.ratio(side))}
        found["first_run_s"] = dict(self.first_s)
        found["relative_l2"], found["not_finite"] = dict(self.difference), list(self.not_finite)
        found["memory"] = {side: memory.as_json() for side, memory in self.memory.items()}
        found["graphs"] = {name: samples.as_json() for name, samples in self.graphs.items()}
        found["new_prompt"] = {side: samples.as_json() for side, samples in self.new_prompt.items()}
        return found


@dataclass(frozen=True)
class BenchResult:
    facts: Mapping[str, Any]  # the work that was measured; equal in comparable benches
    machine: Mapping[str, Any]
    conditions: Mapping[str, Any]  # versions, load, environment
    peak: Peak
    pieces: tuple[Piece, ...]
    runs: Mapping[str, Runs] = field(default_factory=dict)  # end-to-end runs by side
    stopped: str | None = None  # why an end-to-end run stopped early
    memory: Mapping[str, Footprint] = field(default_factory=dict)  # of an end-to-end run, by side
    cache: CacheTimes | None = None  # of a request with a step cache; nothing else here uses one

    @property
    def faults(self) -> tuple[str, ...]:
        """The reasons not to trust the timings, one line each."""
        of_run = [f"{RUN}: {self.stopped}"] if self.stopped else []
        return (*(fault for piece in self.pieces for fault in piece.faults()), *of_run)

    def measurements(self) -> dict[str, float]:
        found = {f"{p.name}.{name}": value for p in self.pieces for name, value in p.measurements()}
        found |= {f"{RUN}.{name}": value for name, value in memory_measurements(self.memory)}
        if (ours := self.runs.get(OURS)) is not None:
            found |= {f"{RUN}.{name}": value for name, value in ours.figures().items()}
            if (eager := self.runs.get(EAGER)) is not None:
                found[f"{RUN}.speedup"] = total_ratio(eager, ours).median
                steps = step_ratio(eager, ours)
                found |= {f"{RUN}.step_speedup": steps.median, f"{RUN}.step_speedup_p10": steps.p10}
        found |= self.cache.measurements() if self.cache else {}
        return {name: value for name, value in found.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        rates = {str(p): rate and rate / 1e12 for p, rate in self.peak.flops_per_s.items() if p in Precision}
        return {
            "format": FORMAT,
            **self.facts,
            "machine": dict(self.machine),
            "conditions": dict(self.conditions),
            "peak": {"tflops": rates, "gb_s": self.peak.bytes_per_s / 1e9, "source": self.peak.source},
            "pieces": {piece.name: piece.as_json() for piece in self.pieces},
            RUN: {side: runs.as_json() for side, runs in self.runs.items()},
            f"{RUN}_memory": {side: used.as_json() for side, used in self.memory.items()},
            **({SUBJECT: self.cache.as_json()} if self.cache else {}),
            "measurements": self.measurements(),
            "faults": list(self.faults),
        }


def read_bench(path: Path, what: str = "bench") -> dict[str, Any]:
    """Read the output of ``BenchReport.as_json``. Errors call the file ``what``.

    Raises:
        UserError: the file is missing, is not a bench, or cannot be used in a report or comparison.
    """
    try:
        content = _content(path.read_text(encoding="utf-8-sig").strip())
        json.dumps(content, ensure_ascii=False).encode()  # fails at a lone surrogate, which no report can hold
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}", "the JSON of a bench", REMEDY) from None
    except (ValueError, RecursionError):
        raise UserError(f"{what} {path}: its last line is not JSON", "the JSON of a bench", REMEDY) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{what} {path}: format {found!r}", FORMAT, REMEDY)
    for key, kind in FIELDS.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{what} {path}: {key} {content.get(key)!r}", f"a {kind.__name__}", REMEDY)
    for name, value in _numbers(content):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise UserError(f"{what} {path}: {name} {value!r:.40}", "a finite number", REMEDY)
    for fault in content["faults"]:
        if not isinstance(fault, str):
            raise UserError(f"{what} {path}: fault {fault!r}", "some text", REMEDY)
    return content


def _content(text: str) -> Any:
    """Parse the whole text, which may be indented, or else its last line."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text.rpartition("\n")[2])


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers that later calculations use, by name."""
    yield from content["measurements"].items()
    load = content["conditions"].get("load_average", [0.0])
    yield "load_average", load[0] if isinstance(load, list) and load else None
    yield "cores", content["machine"].get("cores", 1)
