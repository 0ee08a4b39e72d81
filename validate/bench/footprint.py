"""Peak memory of a piece of work, each side in a process of its own, so that neither hides behind the other.

Every process does one piece on one side and nothing else: libraries, load, two runs; or one whole run from prompt to
frames. Its peak is that of the runs, with libraries and weights in it, and of torch.compile with the compiling; what
the libraries alone take is told beside it.
"""

from collections import deque
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.pipeline import Pipeline
from validate.bench.child_process import child_process
from validate.bench.machine import device_peak
from validate.bench.work import COMPILED, OURS, RUN, TEXT, BenchOptions, Side, work_for
from validate.reference.device import reference_device
from wan22.backends import MODULES
from wan22.bundle import open_bundle
from wan22.memory import peak_bytes, reset_peak, resident_bytes
from wan22.residency import ONE_EXPERT

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LEAVING_SECONDS = 10.0  # for what a process puts away at its end, as the compiler's workers of torch.compile
RUNS = 2  # the second may need more: planned memory, caches of kernels


@dataclass(frozen=True)
class Footprint:
    """Of one process, in bytes; the GPU's are None where there is none."""

    libraries: int
    loaded: int
    peak: int
    device: int | None = None  # the GPU's memory in use by anyone at the peak, as NVML sees it
    device_tensors: int | None = None  # what PyTorch's allocator gave out at its peak; None for ours

    @property
    def beyond_libraries(self) -> int:
        return self.peak - self.libraries

    def as_json(self) -> dict[str, int]:
        return {f"{name}_bytes": value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class FootprintJob:
    side: str
    piece: str
    engines: Path
    checkpoint: str | None
    options: BenchOptions


def footprint(job: FootprintJob) -> Footprint:
    """Runs ``job`` in a new process, which ends when this one is interrupted.

    Raises:
        RuntimeError: the process was killed, as by a system that is out of memory.
    """
    with child_process(_report, job) as (receiver, process):
        try:
            found: Footprint | Exception = receiver.recv()
            process.join(LEAVING_SECONDS)
        except EOFError:
            process.join()
            told = f"the process that measured {job.piece} ({job.side}) ended with {process.exitcode}"
            raise RuntimeError(told) from None
    if isinstance(found, Exception):
        raise found
    return found


def _report(sender: "Connection", job: FootprintJob) -> None:
    try:
        sender.send(_measured(job))
    except Exception as error:
        sender.send(error)


def _measured(job: FootprintJob) -> Footprint:
    bundle = open_bundle(job.engines, "engines")
    _import_libraries(job, bundle.manifest.build.backend if bundle.manifest.build else "")
    libraries = resident_bytes()
    with device_peak() as device, Pipeline(bundle, residency=job.options.residency, choices=ONE_EXPERT) as pipeline:
        side = _side(job, pipeline)
        if job.piece != RUN:
            side.open(job.piece)
        loaded = resident_bytes()
        reset_peak()
        for _ in range(1 if job.piece == RUN else RUNS):
            deque(side.run() if job.piece == RUN else side.chunks(job.piece), maxlen=0)
        peak = peak_bytes()
    return Footprint(libraries, loaded, peak, device.bytes if device else None, side.device_tensors())


def _import_libraries(job: FootprintJob, backend: str) -> None:
    """All that the piece will load, lazy parts of packages too."""
    if job.side == OURS:
        import_module(MODULES[backend])
        return
    import_module("validate.bench.torch_side")
    if job.piece in (TEXT, RUN):
        from transformers import UMT5EncoderModel  # noqa: F401
    if job.piece != TEXT:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401


def _side(job: FootprintJob, pipeline: Pipeline) -> Side:
    work, manifest = work_for(pipeline.bundle, job.options), pipeline.bundle.manifest
    if job.side == OURS:
        from validate.bench.our_side import OurSide

        return OurSide(pipeline, work)
    from export.checkpoint.checkpoint import open_checkpoint
    from validate.bench.torch_side import TorchSide
    from validate.reference.loras import with_loras

    assert job.checkpoint is not None
    checkpoint = with_loras(open_checkpoint(job.checkpoint), manifest)
    device = reference_device(job.options.reference_device, manifest)
    return TorchSide(checkpoint, manifest, work, compiled=job.side == COMPILED, device=device)
