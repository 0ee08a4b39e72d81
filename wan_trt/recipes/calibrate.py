"""Calibrate quantisation: run prompts through a 16- or 32-bit bundle and measure the inputs of its linears.

The bundle's transformers get more outputs (:mod:`export.graphs.taps`): the largest magnitude of each linear's input,
its mean and spread by channel, and the crest that is left by the vectors which an export measures without data. They
are built for any target and sample the prompts like a user's run, each expert at its own timesteps, with both branches
of guidance. Maxima become static FP8 scales, means and spreads the vectors of :mod:`export.quantise.inputs`; crests
tell which linears INT8 does not suit. One pass over the full-precision model is enough.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from engines.build import BuildOptions, build_engines
from engines.targets import target_named
from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK
from export.graphs.linear import FLOAT8_MAX, kind_of
from export.quantise.input_scales import MARGIN, LinearScales, Scales, largest_magnitude, write_input_scales
from export.quantise.inputs import (
    CENTRED,
    CREST_TO_ERROR,
    FP8_ERROR,
    ExpertInputs,
    MeasuredInput,
    column_maxima,
    crests_by_kind,
    input_width,
    smoothing_factors,
    too_peaked,
    write_inputs,
)
from export.quantise.measure import Read, measure_inputs
from runtime.built_for import fill_defaults
from runtime.pipeline import Pipeline
from runtime.prompts import Prompt, read_prompts
from runtime.request import CompleteRequest, Request
from wan22.backends import runs_graphs
from wan22.bundle import Bundle, Manifest, file_entry, open_bundle, write_manifest
from wan22.component import Component
from wan22.errors import NonFiniteError, UserError
from wan22.files import whole_file
from wan22.onnx_file import check_graphs
from wan22.outputs import check_apart, check_no_source
from wan22.precision import Precision
from wan22.progress import Progress, silent
from wan22.quantities import counted
from wan22.residency import ONE_EXPERT, ResidencyChoice

if TYPE_CHECKING:
    from export.graphs.taps import Tapped, Taps


@dataclass(frozen=True)
class CalibrateOptions:
    """The runs to measure."""

    prompts: Path  # see :func:`runtime.prompts.read_prompts`
    request: Request = field(default_factory=Request)  # for every prompt; its seed is the first, others count up
    margin: float = MARGIN
    target: str = "cpu"
    means: Path | None = None  # also write means and factors of the inputs, for ``wan-trt export --input-means``
    overwrite: bool = False
    residency: ResidencyChoice = "auto"  # engines that stay loaded


@dataclass(frozen=True)
class Calibration:
    """The measured values, and the number of runs behind them."""

    inputs: Mapping[str, Mapping[str, float]]  # largest input by expert and linear, without margin
    scales: Mapping[str, Scales] = field(repr=False)
    measured: Mapping[str, Mapping[str, MeasuredInput]] = field(repr=False)  # by expert and linear
    forwards: Mapping[str, int]  # by expert, over prompts, steps and both branches of guidance
    prompts: int
    steps: int

    @property
    def coverage(self) -> str:
        linears = sum(map(len, self.inputs.values()))
        runs = ", ".join(f"{counted(count, 'forward')} of {expert}" for expert, count in self.forwards.items())
        return f"{linears} linears, {counted(self.prompts, 'prompt')} of {counted(self.steps, 'step')}: {runs}"

    def table(self) -> Table:
        """Largest inputs over the blocks, by expert and kind of linear; their crest and what INT8 makes of it."""
        headings = ("expert", "linear", "blocks", "min", "median", "max", "crest", "in INT8")
        table = Table(*headings, title="Largest inputs; crest of what quantised graphs make of them; error of rows")
        for expert, found in self.inputs.items():
            crests = crests_by_kind(self.measured[expert])
            for kind in DIT_LINEARS_PER_BLOCK:
                values = [value for name, value in found.items() if kind_of(name) == kind]
                figures = [f"{of(values):.3g}" for of in (min, median, max)]
                if (crest := crests.get(kind)) is not None:
                    figures += [f"{crest:.1f}", f"{crest / CREST_TO_ERROR:.1%}"]
                table.add_row(expert, kind, str(len(values)), *figures)
        return table

    @property
    def advice(self) -> str:
        """What ``wan-trt export --precision int8`` should be told."""
        peaked = {kind: crest for found in self.measured.values() for kind, crest in too_peaked(found).items()}
        if not peaked:
            return f"INT8 errs less than FP8 ({FP8_ERROR:.1%}) in every linear: --precision int8 needs nothing else"
        kept = ",".join(f"{kind}={{}}" for kind in sorted(peaked))
        return (
            f"INT8 errs more than FP8 ({FP8_ERROR:.1%}) in {', '.join(sorted(peaked))}: --precision int8 "
            f"--keep-high-precision {kept.format(*['fp8'] * len(peaked))} (bf16 for GPUs without FP8)"
        )


def calibrate(bundle: Path, out: Path, options: CalibrateOptions, progress: Progress = silent) -> Calibration:
    """Measure the ONNX bundle at ``bundle`` and write the scales to ``out``, for ``wan-trt export --input-scales``.

    Raises:
        UserError: not an ONNX bundle, it is already quantised, no prompts, too few steps for both experts, numbers that
            overflow, a target that cannot run it, an existing file.
        NonFiniteError: the model computes NaN or infinity.
    """
    for path in filter(None, (out, options.means)):
        if path.exists() and not options.overwrite:
            raise UserError(f"{path} exists", "a new file", "choose another or add --overwrite")
        check_no_source(path, bundle, options.prompts)
    check_apart(out, options.means)
    source = open_bundle(bundle, "graphs")
    spec = source.manifest.spec
    check_graphs(source)
    _check_precision(source)
    requests = _requests(read_prompts(options.prompts, spec.takes.image), source, options)
    if idle := set(spec.experts) - set(requests[0].experts(spec)):
        raise UserError(f"{requests[0].steps} steps, none by {min(idle)}", "steps of every expert", "use more --steps")
    with_means = whole_file(options.means, "means") if options.means is not None else nullcontext()
    with whole_file(out, "scales") as new, with_means as new_means:
        with tempfile.TemporaryDirectory(dir=new.parent) as temporary:
            folder = Path(temporary)
            taps = write_tapped(source, folder / "graphs", options.target, progress)
            build_engines(folder / "graphs", folder / "engines", _build_options(source, requests[0], options), progress)
            with TappedPipeline(open_bundle(folder / "engines", "engines"), taps, options.residency) as pipeline:
                _run(pipeline, requests, progress)
                found = pipeline.tapped
        inputs = {expert: _largest(expert, found[expert]) for expert in spec.experts}
        read = {expert: _reader(source.path(source.component(expert).graph)) for expert in spec.experts}
        scales = {expert: _scales(read[expert], part, options.margin) for expert, part in inputs.items()}
        measured = {expert: _measured(read[expert], found[expert]) for expert in spec.experts}
        write_input_scales(new, scales, spec)
        if new_means is not None:
            write_inputs(new_means, {e: ExpertInputs(measured[e], scales[e], found[e].forwards) for e in spec.experts})
    forwards = {expert: found[expert].calls for expert in spec.experts}
    return Calibration(inputs, scales, measured, forwards, len(requests), requests[0].steps)


def _check_precision(source: Bundle) -> None:
    for expert in source.manifest.spec.experts:
        if (found := source.component(expert).precision).quantised:
            expected = f"one of {', '.join(p for p in Precision if not p.quantised)}"
            raise UserError(f"{expert} in {found}", expected, "export the model in 16 bits and calibrate that")


def _requests(prompts: list[Prompt], source: Bundle, options: CalibrateOptions) -> list[CompleteRequest]:
    of_each = replace(options.request, fit="crop")
    return [
        fill_defaults(replace(of_each, prompt=prompt.text, image=prompt.image, seed=seed), source.manifest)
        for seed, prompt in enumerate(prompts, of_each.seed)
    ]


def _build_options(source: Bundle, request: CompleteRequest, options: CalibrateOptions) -> BuildOptions:
    if source.manifest.size or runs_graphs(target_named(options.target).backend):
        return BuildOptions(options.target)
    return BuildOptions(options.target, f"{request.width}x{request.height}", str(request.frames))


# -- the tapped bundle


def write_tapped(source: Bundle, folder: Path, target: str, progress: Progress) -> dict[str, "Taps"]:
    """Write ``source`` without the decoder and with taps in its transformers; return the taps by expert."""
    import onnx_ir as ir

    from engines.cpu.emulation import emulate
    from export.graphs.taps import add_taps, linear_inputs

    on_cpu = target_named(target).backend == "onnxruntime"
    spec = source.manifest.spec
    taps: dict[str, Taps] = {}
    components: list[Component] = []
    for component in source.manifest.components:
        if component.name.startswith("vae_decoder"):
            continue
        model, tapped = ir.load(source.path(component.graph)), component
        if component.name in spec.experts:
            entering = linear_inputs(model)
            rows = {n: (x, input_width(spec.dit, n)) for n, x in entering.items() if kind_of(n) in CENTRED}
            blocks = len(taps) * spec.dit.layers, len(spec.experts) * spec.dit.layers
            read = _reader(source.path(component.graph))
            try:
                without_data = measure_inputs(read, spec, component.name, progress, blocks)
            except UserError as error:  # its only one: to this command the model is no input of the user's making
                raise NonFiniteError(f"{component.name}, {error.found}") from None
            vectors = {name: measured.vectors for name, measured in without_data.items()}
            taps[component.name] = found = add_taps(model, entering, rows, vectors)
            tapped = replace(tapped, outputs=(*tapped.outputs, *found.outputs))
        if on_cpu and component.precision == Precision.BF16:
            emulate(model)
            tapped = replace(tapped, precision=Precision.FP32)
        path = folder / component.graph.path
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path)
        components.append(replace(tapped, graph=file_entry(folder, path), stages=()))
    manifest = replace(source.manifest, components=tuple(components))
    _link_others(source.folder, manifest, folder)
    write_manifest(folder, manifest)
    return taps


def _reader(graph: Path) -> Read:
    """A reader of the weights of ``graph`` by name."""
    import onnx_ir as ir

    stored = {name: value.const_value for name, value in ir.load(graph).graph.initializers.items()}

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        assert tensor is not None
        return np.array(tensor.numpy())

    return read


def _link_others(source: Path, manifest: Manifest, folder: Path) -> None:
    """Hard-link the files of ``manifest`` that ``folder`` lacks, or copy them if the file system has no hard links."""
    for path in manifest.files():
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / path, target)
            except OSError:
                shutil.copyfile(source / path, target)


# -- the runs


class TappedPipeline(Pipeline):
    """A pipeline whose experts record the values of their taps."""

    def __init__(self, bundle: Bundle, taps: Mapping[str, "Taps"], residency: ResidencyChoice) -> None:
        super().__init__(bundle, residency=residency, choices=ONE_EXPERT)
        self._taps = taps
        self.tapped: dict[str, Tapped] = {}

    def engine(self, name: str) -> Any:
        from export.graphs.taps import Tapped

        engine: Any = super().engine(name)
        if name not in self._taps:
            return engine
        tapped = self.tapped.setdefault(name, Tapped(engine, self._taps[name]))
        tapped.graph = engine
        return tapped


def _run(pipeline: Pipeline, requests: list[CompleteRequest], progress: Progress) -> None:
    done, total = 0, sum(request.steps for request in requests)
    for request in requests:
        for _ in pipeline.denoise(request):
            done += 1
            progress("calibrate", done, total, "steps")


def _largest(expert: str, tapped: "Tapped") -> dict[str, float]:
    if bad := [name for name, value in tapped.largest.items() if not isfinite(value)]:
        raise UserError(f"{expert}: inputs of {bad[0]} overflow", "finite values", "calibrate a bf16 bundle")
    return tapped.largest


def _scales(read: Read, inputs: Mapping[str, float], margin: float) -> Scales:
    smallest = 1e-6  # for an input that is always zero
    largest = {name: largest_magnitude(read(f"{name}.weight")) for name in inputs}
    return {
        name: LinearScales(max(value * margin, smallest) / FLOAT8_MAX, max(largest[name], smallest) / FLOAT8_MAX)
        for name, value in inputs.items()
    }


def _measured(read: Read, tapped: "Tapped") -> dict[str, MeasuredInput]:
    """Means and factors of the prompts' inputs, and the crest that an export without them would meet."""
    found = {}
    for name, mean in tapped.means.items():
        factor = smoothing_factors(tapped.spreads[name], column_maxima(read, name))
        crest = tapped.crests[name]
        found[name] = MeasuredInput(mean, factor, crest if isfinite(crest) else None)
    return found
