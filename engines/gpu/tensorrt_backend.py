"""ONNX to a serialized engine, for TensorRT 10.13 to 11 and for TensorRT-RTX: the two modules share one API.

The code tests features of the module, not its name: TensorRT-RTX builds for a given compute capability without a GPU;
TensorRT times kernels on the GPU it finds and stores the timings in a cache. Networks are strongly typed, so the graph
determines precision. TF32 is off by default, because it would undo the graphs' deliberate float32 operations.

The builder's verbose log is kept next to the engine; ``engines.inspect.log`` reads the compiled kernels from it.
"""

import contextlib
import ctypes
import io
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TextIO

from engines.gpu.mapped_weights import MappedWeights
from engines.gpu.timing_cache import timing_cache
from engines.profiles import input_shapes
from engines.targets import Target
from wan22.backends import MODULES, Backend, require_module
from wan22.component import Tensor
from wan22.errors import UserError
from wan22.precision import Number
from wan22.progress import Progress, silent
from wan22.shapes import Profile, own_profiles

OLDEST_TENSORRT, OLDEST_WITH_FP4 = (10, 13), (11, 0)
ERRORS_KEPT = 20


@dataclass(frozen=True)
class EngineOptions:
    target: Target
    profiles: tuple[Profile, ...]  # one optimisation profile each; not needed if every shape is fixed
    inputs: tuple[Tensor, ...]
    tf32: bool = False
    timing_cache: Path | None = None  # TensorRT only: read if it exists, rewritten after the build
    name: str = ""  # the network's name, stored in the plan; empty keeps the parser's
    aux_streams: int | None = 0  # additional streams; each needs its own activation memory


@dataclass(frozen=True)
class BuiltEngine:
    path: Path
    log: Path
    seconds: float
    size_bytes: int


def load_module(backend: Backend, numbers: Collection[Number] = ()) -> ModuleType:
    """The module that builds and runs engines of ``backend``, which multiply ``numbers``.

    Raises:
        UserError: it is not installed or too old.
    """
    module = require_module(MODULES[backend], backend, f"{backend} for this target")
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    needed = OLDEST_WITH_FP4 if Number.NVFP4 in numbers else OLDEST_TENSORRT
    if backend == "tensorrt" and version < needed:
        oldest = ".".join(map(str, needed))
        raise UserError(f"tensorrt {module.__version__}", f"{oldest} or later", "pip install --upgrade tensorrt")
    return module


def log_beside(engine: Path) -> Path:
    """The path of the builder's log for ``engine``."""
    return engine.with_suffix(".log")


@contextlib.contextmanager
def keep_log(plan: Path, folder: Path) -> Iterator[None]:
    """Copy the builder's log of ``plan`` to ``folder`` if its build is refused."""
    try:
        yield
    except UserError:
        if log_beside(plan).exists():
            shutil.copyfile(log_beside(plan), folder / f"{plan.stem}.build.log")
        raise


def build_engine(graph: Path, engine: Path, options: EngineOptions, progress: Progress = silent) -> BuiltEngine:
    """Compile the ONNX file ``graph`` to ``engine``, which appears only when complete; the log is kept in any case.

    Raises:
        UserError: the module is missing, the graph does not parse, or the build fails (with the builder's last errors).
        KeyboardInterrupt: after Ctrl-C, once the builder has stopped.
    """
    trt = load_module(options.target.backend)
    started = time.monotonic()
    partial, log_path = engine.with_suffix(".partial"), log_beside(engine)
    try:
        with log_path.open("w", encoding="utf-8") as log:
            build = _Build(trt, options, _logger(trt, log), _monitor(trt, engine.stem, progress))
            build.run(graph, partial)
        partial.rename(engine)
    finally:
        partial.unlink(missing_ok=True)
    return BuiltEngine(engine, log_path, time.monotonic() - started, engine.stat().st_size)


def check_parses(graph: Path, target: Target) -> None:
    """Parse the ONNX file ``graph`` like a build for ``target``. Raises UserError like :func:`build_engine`."""
    trt, options = load_module(target.backend), EngineOptions(target, (), ())
    _Build(trt, options, _logger(trt, io.StringIO()), _monitor(trt, graph.stem, silent)).parse(graph)


class _Build:
    """One run of the builder. Keeps network, parser and configuration alive, because the builder borrows them."""

    def __init__(self, trt: Any, options: EngineOptions, logger: Any, monitor: Any) -> None:
        self.trt, self.options, self.logger, self.monitor = trt, options, logger, monitor
        self.builder = trt.Builder(logger)
        # Strongly typed: a flag up to TensorRT 10, the only kind of network after it.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        self.parser = trt.OnnxParser(self.network, logger)
        self.config = self.builder.create_builder_config()
        self.weights: MappedWeights | None = None

    def run(self, graph: Path, engine: Path) -> None:
        self.parse(graph)
        self.configure()
        timings = self.options.timing_cache if self.options.target.backend == "tensorrt" else None
        with timing_cache(self.config, timings), engine.open("wb") as stream:
            done = _in_background(lambda: self.write(stream), self.monitor, self.drop_pages)
        if not done:
            raise self.failure(graph)

    def parse(self, graph: Path) -> None:
        """Read the graph and map its weights into memory.

        Raises:
            UserError: the graph does not parse.
        """
        if not hasattr(self.parser, "load_initializer"):
            parsed = self.parser.parse_from_file(str(graph))
        else:
            self.weights = MappedWeights(graph)
            loaded = self.parser.load_model_proto(graph.read_bytes(), str(graph))
            parsed = loaded and self.weights.load_into(self.parser) and self.parser.parse_model_proto()
        if parsed:
            self.network.name = self.options.name or self.network.name
            return
        errors = [self.parser.get_error(index) for index in range(self.parser.num_errors)]
        first = f"{errors[0].node_name() or errors[0].node_operator()}: {errors[0].desc()}" if errors else "no reason"
        raise UserError(f"{graph.name} does not parse: {first}", "operators TensorRT supports", "export it again")

    def drop_pages(self) -> None:
        """Free the page memory of weights that the builder has read."""
        if self.weights is not None:
            self.weights.drop_pages()

    def configure(self) -> None:
        trt, config, options = self.trt, self.config, self.options
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self.monitor
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.aux_streams is not None:
            config.max_aux_streams = options.aux_streams
        if hasattr(config, "set_compute_capability"):
            _set_architecture(trt, config, options.target)
        if hasattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10"):  # scratch memory follows the call's shapes
            config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
        for profile in own_profiles(options.profiles, options.inputs):
            shapes = self.builder.create_optimization_profile()
            for tensor in options.inputs:
                shapes.set_shape(tensor.name, *input_shapes(tensor, profile))
            config.add_optimization_profile(shapes)

    def write(self, stream: BinaryIO) -> bool:
        """Build and write the engine; False if the builder failed."""
        if hasattr(self.builder, "build_serialized_network_to_stream"):
            writer = _stream_writer(self.trt, stream)
            done = bool(self.builder.build_serialized_network_to_stream(self.network, self.config, writer))
            if writer.error:
                raise writer.error
            return done and stream.tell() > 0
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is not None:
            stream.write(memoryview(plan))
        return plan is not None

    def failure(self, graph: Path) -> UserError:
        errors = "; ".join(self.logger.errors) or "the builder reported no reason"
        expected = f"a graph that {self.options.target.backend} compiles for {self.options.target.name}"
        return UserError(f"cannot build {graph.name}: {errors}", expected, "see the builder's log")


def _set_architecture(trt: Any, config: Any, target: Target) -> None:
    """Set the architecture for TensorRT-RTX, which would otherwise build a generic engine."""
    capability = getattr(trt.ComputeCapability, target.sm, None)
    if capability is None:
        expected = f"an architecture that {trt.__name__} {trt.__version__} supports"
        raise UserError(f"{target.name} ({target.sm})", expected, "build on that GPU with TensorRT")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


def _in_background(work: Callable[[], bool], monitor: Any, meanwhile: Callable[[], None]) -> bool:
    """Run ``work`` in a thread, so that this thread can receive Ctrl-C while the builder works; wait until it ends.

    Calls ``meanwhile`` every 0.2 s. Waits for the future: an interrupted ``Thread.join`` considers the thread finished,
    and a process that exits while the builder works crashes.
    """
    with ThreadPoolExecutor(1, "engine-builder") as pool:
        future = pool.submit(work)
        try:
            while not wait([future], 0.2).done:
                meanwhile()
        except KeyboardInterrupt:
            monitor.cancelled = True
            while not future.done():  # however often Ctrl-C is pressed
                with contextlib.suppress(KeyboardInterrupt):
                    wait([future])
            raise
        return future.result()


def _logger(trt: Any, log: TextIO) -> Any:
    """A logger that writes everything to ``log`` and keeps the last errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=ERRORS_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            log.write(f"[{severity.name}] {message}\n")

    return Logger()


def _monitor(trt: Any, name: str, progress: Progress) -> Any:
    """A monitor that reports the builder's outermost phases; ``cancelled`` stops the build at its next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[phase] = steps
                progress(f"{name}: {phase}", 0, steps, "steps")

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(f"{name}: {phase}", step + 1, self.steps[phase], "steps")
            return not self.cancelled

        def phase_finish(self, phase: str) -> None:
            if steps := self.steps.pop(phase, 0):
                progress(f"{name}: {phase}", steps, steps, "steps")

    return Monitor()


def _stream_writer(trt: Any, stream: BinaryIO) -> Any:
    """A writer that receives the engine in pieces, so that it is never completely in memory."""
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: Any, size: int | None = None) -> int:
            try:
                return stream.write(data if size is None else ctypes.string_at(pointer_of(data, None), size))
            except OSError as error:  # the binding would only log it
                self.error = error
                return 0

    return Writer()
