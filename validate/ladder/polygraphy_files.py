"""One real call of every engine, in files that ``polygraphy run`` reads, for debugging a failed row.

The files hold the inputs and outputs of the ladder's first call of each engine. ``polygraphy run`` feeds the inputs to
another backend or build and compares its outputs, layer by layer if needed::

    polygraphy run onnx/low_noise.onnx --onnxrt
        --load-inputs calls/low_noise.inputs.json --load-outputs calls/low_noise.outputs.json
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime.arrays import to_numpy
from runtime.backend import NewEngine
from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.engine import Arrays, BorrowedEngine, Engine
from runtime.pipeline import Pipeline
from wan22.bundle import Bundle
from wan22.errors import UserError
from wan22.files import whole_file
from wan22.residency import RESIDENCIES, Residency, ResidencyChoice

Record = Callable[[str, dict[str, np.ndarray], dict[str, np.ndarray]], None]  # component, inputs, outputs


class RecordingPipeline(Pipeline):
    """A pipeline that writes the first call of each engine into the folder ``calls``."""

    def __init__(
        self,
        bundle: Bundle,
        calls: Path,
        *,
        residency: ResidencyChoice = "auto",
        choices: Sequence[Residency] = RESIDENCIES,
        new_engine: NewEngine | None = None,
        blocks: BlockOptions = BLOCKS_AS_FIT,
    ) -> None:
        super().__init__(bundle, residency=residency, choices=choices, new_engine=new_engine, blocks=blocks)
        self._calls, self._recorded = calls, set[str]()

    def engine(self, name: str) -> Engine:
        engine = super().engine(name)
        return engine if name in self._recorded else RecordedEngine(engine, name, self._record)

    def _record(self, name: str, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        if name not in self._recorded:
            self._recorded.add(name)
            write_call(self._calls, name, inputs, outputs)


class RecordedEngine(BorrowedEngine):
    """An engine whose calls are passed to ``record``. The pipeline, not this wrapper, opens and closes it."""

    def __init__(self, engine: Engine, name: str, record: Record) -> None:
        self._engine, self._name, self._record = engine, name, record
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        recorded = {name: array.copy() for name, array in inputs.items()}  # the call overwrites state
        answer = self._engine(**inputs)
        arrays = answer if isinstance(answer, tuple) else (answer,)
        self._record(self._name, recorded, {t.name: array for t, array in zip(self.outputs, arrays, strict=True)})
        return answer


def check_calls(folder: Path) -> None:
    """Create ``folder``. Raises UserError if that fails or polygraphy is not installed."""
    try:
        import polygraphy  # noqa: F401
    except ImportError:
        raise UserError("polygraphy is not installed", "polygraphy for --calls", "pip install polygraphy") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write calls to {folder}: {error.strerror}", "a folder", "choose another") from None


def write_call(folder: Path, name: str, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    """Write ``<name>.inputs.json`` and ``<name>.outputs.json`` atomically; arrays may lie on a device."""
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    given, answers = ({key: to_numpy(array) for key, array in arrays.items()} for arrays in (inputs, outputs))
    answered = RunResults([("wan-trt", [IterationResult(answers, runner_name="wan-trt")])])
    for leaf, content in (("inputs", [given]), ("outputs", answered)):
        with whole_file(folder / f"{name}.{leaf}.json", wait=True) as partial:
            save_json(content, str(partial))
