"""What only TensorRT-RTX has at run time: it compiles kernels on the machine that runs them, so it can say in advance
whether an engine runs there, and keep its kernels.

Kernels of an engine are kept in a file beside the bundle, or in the user's cache folder if that place is read-only. Its
name holds GPU, driver and version; TensorRT-RTX itself refuses a file that does not fit. Losing it costs compilation.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from wan22.component import Component
from wan22.errors import UserError
from wan22.files import write_file

CACHES = Path.home() / ".cache" / "wan-trt"


def check_valid(trt: Any, runtime: Any, content: Any, name: str) -> None:
    """Refuse the plan ``content``, called ``name``, that TensorRT-RTX cannot run here; older modules cannot tell.

    Raises:
        UserError: with TensorRT-RTX's reasons.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, reasons = runtime.get_engine_validity(content)
    if validity == trt.EngineValidity.INVALID:
        kinds = trt.EngineInvalidityDiagnostics
        named = [kind.name.lower().replace("_", " ") for kind in kinds.__members__.values() if int(kind) & int(reasons)]
        found = f"{name} does not run here: {', '.join(named) or 'no usable driver'}"
        raise UserError(found, "an engine for this GPU, driver and TensorRT-RTX", "update the driver, or build here")


class KernelCache:
    """The compiled kernels of one engine, in a file between processes."""

    def __init__(self, gpu: Any, folder: Path, component: Component) -> None:
        self._name = f"{Path(component.graph.path).stem}-{component.graph.sha256[:12]}.kernels"
        self._places = [folder.parent / f"{folder.name}.kernels", CACHES]
        self._key, self._stored = _machine(gpu), b""
        self._cache: Any = None

    @property
    def files(self) -> list[Path]:
        """The places of the file, the preferred one first."""
        return [place / self._key / self._name for place in self._places]

    def attach(self, config: Any) -> None:
        """Let the context made with ``config`` use the kept kernels, and collect those that it compiles."""
        self._cache = config.create_runtime_cache()
        for path in self.files:
            with contextlib.suppress(OSError):
                self._stored = path.read_bytes()
                break
        if self._stored and not self._cache.deserialize(self._stored):
            self._stored = b""
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the kernels if there are new ones. A place that cannot be written to is skipped."""
        content = bytes(self._cache.serialize()) if self._cache is not None else b""
        if len(content) == len(self._stored):  # kernels are only ever added
            return
        for path in self.files:
            with contextlib.suppress(OSError, UserError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, content)
                self._stored = content
                return


def configure(trt: Any, config: Any, *, fixed: bool) -> None:
    """Compile kernels for the shapes of a call before it, not during later ones; replay calls of ``fixed`` shapes."""
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if fixed:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def _machine(gpu: Any) -> str:
    """GPU, driver and TensorRT-RTX in the name of a folder."""
    runtime = gpu.cupy.cuda.runtime
    card = runtime.getDeviceProperties(runtime.getDevice())["name"]
    words = f"{card.decode()}-driver{runtime.driverGetVersion()}-{gpu.trt.__version__}"
    return re.sub(r"[^\w.-]+", "-", words)
