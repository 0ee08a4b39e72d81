"""Peak memory of a piece of work, measured in a separate process per side.

Each process runs one piece on one side: it imports the libraries, loads the weights and runs twice, or once from prompt
to frames. The peak covers the runs and includes libraries, weights and, for torch.compile, the compilation. The memory
of the libraries alone is reported separately.
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

LEAVING_SECONDS = 10.0  # for the cleanup at exit, such as torch.compile's workers
RUNS = 2  # the second may need more: planned memory, kernel caches


@dataclass(frozen=True)
class Footprint:
    """Memory of one process in bytes; the values of the GPU are None without one."""

    libraries: int
    loaded: int
    peak: int
    device: int | None = None  # the peak of GPU memory in use by all processes, from NVML
    device_tensors: int | None = None  # the peak of PyTorch's allocator; None for our side

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
    """Measure ``job`` in a new process, which ends if this one is interrupted.

    Raises:
        RuntimeError: the process was killed, for example by the kernel for lack of memory.
    """
    with child_process(_report, job) as (receiver, process):
        try:
            found: Footprint | Exception = receiver.recv()
            process.join(LEAVING_SECONDS)
        except EOFError:
            process.join()
            problem = f"the process that measured {job.piece} ({job.side}) ended with {process.exitcode}"
            raise RuntimeError(problem) from None
    if isinstance(found, Exception):
        raise found
    return found


def _report(sender: "Connection", job: FootprintJob) -> None:
    try:
        sender.send(_measure(job))
    except Exception as error:
        sender.send(error)


def _measure(job: FootprintJob) -> Footprint:
    bundle = open_bundle(job.engines, "engines")
    _import_libraries(job, bundle.manifest.build.backend if bundle.manifest.build else "")
    libraries = resident_bytes()
    how, blocks = job.options.residency, job.options.blocks
    with device_peak() as device, Pipeline(bundle, residency=how, choices=ONE_EXPERT, blocks=blocks) as pipeline:
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
    """Import everything that the piece loads, including lazy parts of packages."""
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

        pipeline.fit(work.request.video)
        return OurSide(pipeline, work)
    from validate.bench.torch_side import TorchSide
    from validate.reference.checkpoint import open_same_model

    assert job.checkpoint is not None
    checkpoint = open_same_model(job.checkpoint, job.engines, manifest)
    device = reference_device(job.options.reference_device, manifest)
    return TorchSide(checkpoint, manifest, work, compiled=job.side == COMPILED, device=device)
