"""What benches of whole jobs on two sides share: the request, what is recorded of it, and how a result is judged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.text import Text

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.built_for import fill_defaults
from runtime.request import CompleteRequest, Request
from triton_repo.repository import Topology
from validate.bench.machine import BUSY, load_average, machine, usable_cores, versions
from validate.bench.samples import Ratio, Samples
from validate.gate import Gate, Verdict, check_mark, judge, read_gates
from validate.options import with_samples
from wan22.bundle import Manifest
from wan22.quantities import counted, video_text
from wan22.residency import ResidencyChoice

RUNS, STEPS = 10, 10


@dataclass(frozen=True)
class ServedOptions:
    request: Request = field(default_factory=Request)  # STEPS steps by default; see validate.options.with_samples
    # measurements
    topology: Topology = "owner"
    runs: int = RUNS  # timed runs per side
    warmup: int = 2  # untimed runs per side before them
    cancels: int = 10  # jobs to cancel, one after the other
    gate: Path | None = None  # TOML, see :mod:`validate.gate`; None: the targets
    residency: ResidencyChoice = "auto"  # the engines that stay loaded on each side
    # for the record
    command: str = ""
    blocks: BlockOptions = BLOCKS_AS_FIT  # where the weights of engines in blocks are

    def gates(self, known: Sequence[str], targets: tuple[Gate, ...]) -> tuple[Gate, ...]:
        """The gates of the file, or the ``targets``. Raises UserError for a measurement that is not ``known``."""
        return read_gates(self.gate, "bench", tuple(known)) if self.gate else targets

    def job(self, manifest: Manifest) -> tuple[Request, CompleteRequest, dict[str, Any]]:
        """The request, which leaves nothing for the sides to differ in, complete, and what is recorded of it."""
        steps = STEPS if self.request.steps is None else self.request.steps
        request = with_samples(replace(self.request, steps=steps), manifest)
        complete = fill_defaults(request, manifest)
        return request, complete, {
            "model": manifest.spec.name, "width": complete.width, "height": complete.height,
            "frames": complete.frames, "steps": complete.steps, "runs": self.runs, "machine": machine(),
            "load_average": load_average(), "versions": versions(), "command": self.command,
        }  # fmt: skip


class TwoSides:
    """A result: the times of whole jobs, of which those of the second side hold those of the first."""

    SIDES: ClassVar[tuple[str, str]]
    facts: dict[str, Any]
    samples: Mapping[str, Samples]
    gates: tuple[Gate, ...]

    def measurements(self) -> dict[str, float]:
        raise NotImplementedError

    @property
    def ratio(self) -> Ratio:
        """The second side's time over the first's, of neighbouring runs."""
        first, second = (self.samples[side].seconds for side in self.SIDES)
        return Ratio.of(second, first)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return judge(self.gates, self.measurements())

    def __bool__(self) -> bool:
        return all(self.verdicts)

    @property
    def title(self) -> str:
        model, *size = (self.facts[name] for name in ("model", "width", "height", "frames"))
        return f"{model}: {video_text(*size)}, {counted(self.facts['steps'], 'step')}"

    def judged(self) -> dict[str, Any]:
        """The end of the JSON."""
        gates = [verdict.as_json() for verdict in self.verdicts]
        return {
            "ratio": vars(self.ratio), "measured": self.measurements(), "gates": gates, "passed": bool(self),
        }  # fmt: skip

    def ratio_line(self) -> str:
        (first, second), ratio = self.SIDES, self.ratio
        return f"{second} / {first} {ratio.median:.3f} (p10 {ratio.p10:.3f}, p90 {ratio.p90:.3f})"

    def verdict_lines(self) -> Iterator[RenderableType]:
        yield from (check_mark(verdict, str(verdict)) for verdict in self.verdicts)
        if self.facts["load_average"] > BUSY * usable_cores():
            yield Text("the machine was busy before the bench: do not trust the times", "yellow")
