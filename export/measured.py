"""The measurements behind quantised experts: from files, by the checkpoint's publisher, or made here without data."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.checkpoint.checkpoint import Checkpoint, Weights
from export.files.decoded import Codes, Nvfp4
from export.graphs.linear import CODES, kind_of
from export.graphs.taps import Forwards
from export.options import ExportOptions
from export.precisions import LINEARS, precisions_of, usual_exceptions
from export.quantise.input_scales import Scales, check_weights, read_input_scales
from export.quantise.inputs import MeasuredInput, read_inputs, too_peaked
from export.quantise.measure import GRID, GRID_FOR_FP4, forwards_of_noise, inputs_of_zeros, measure_inputs
from export.quantise.published import SAME_INPUT, published
from wan22.errors import UserError
from wan22.precision import Number, Precision
from wan22.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Measured:
    """Measurements on the inputs of an expert's linears, and what follows from them."""

    scales: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, MeasuredInput] = field(default_factory=dict)
    forwards: Forwards | None = None  # to take rows of inputs from
    wide_blocks: frozenset[int] = frozenset()  # blocks that the checkpoint's publisher did not quantise
    exceptions: Mapping[str, Number] = field(default_factory=dict)  # linears of a type other than the precision's


def read_measured(
    source: Checkpoint, base: Checkpoint, options: ExportOptions, progress: Progress
) -> dict[str, Measured]:
    """Measurements by quantised expert: from files, by the checkpoint's publisher, or made here without data.

    Raises:
        UserError: they match neither the weights of ``source`` nor those of ``base``, the checkpoint without LoRAs.
    """
    scales, means = options.input_scales, options.input_means
    if scales is not None and means is not None:
        expected = "only one: scales are measured on inputs that are not centred"
        raise UserError("--input-scales and --input-means", expected, "leave one out")
    spec, precisions = source.spec, precisions_of(source.spec, options)
    chosen = [e for e in spec.experts if precisions[e].quantised and (not options.parts or e in options.parts)]
    takes_scales = [expert for expert in chosen if (n := precisions[expert].linears) in CODES and CODES[n].takes_scales]
    measured = _from_files(source, base, options, chosen, takes_scales)
    for expert in (expert for expert in chosen if expert not in measured):
        weights = source.weights[expert]
        theirs = published(weights, spec.dit.layers)
        if expert in takes_scales and theirs.input_scales:
            measured[expert] = Measured(theirs.input_scales, wide_blocks=theirs.wide_blocks)
            continue
        _warn_of_codes(expert, weights.codes(f"blocks.{spec.dit.layers // 2}.ffn.0.weight"), precisions[expert])
        if options.sparse:
            measured[expert] = Measured(inputs=inputs_of_zeros(spec.dit))
    for expert in (expert for expert in chosen if not measured.get(expert, Measured()).scales):
        known, weights = measured.get(expert, Measured()), source.weights[expert]
        fp4 = fp4_kinds(precisions[expert], options)
        if not options.sparse and (fp4 or not known.inputs):
            given = known.forwards or forwards_of_noise(spec, expert, GRID_FOR_FP4 if fp4 else GRID)
            blocks = chosen.index(expert) * spec.dit.layers, len(chosen) * spec.dit.layers
            known = _with(known, measure_inputs(weights.read, spec, expert, progress, blocks, fp4, given))
        measured[expert] = _as_stored(known, weights, expert, fp4, options.low_rank)
    kept = _kept_by_crest(measured, precisions, options) | dict(options.exceptions)
    usual = {expert: usual_exceptions(precisions[expert]) for expert in measured}
    return {expert: replace(known, exceptions=usual[expert] | kept) for expert, known in measured.items()}


def _from_files(
    source: Checkpoint,
    base: Checkpoint,
    options: ExportOptions,
    chosen: Collection[str],
    takes_scales: Collection[str],
) -> dict[str, Measured]:
    """The measurements of the files that ``options`` name, of the experts that are ``chosen``."""
    measured: dict[str, Measured] = {}
    if (scales := options.input_scales) is not None:
        for expert, part in read_input_scales(scales, source.spec).items():
            _check_weights(scales, part, expert, (source, base))
            if expert in takes_scales:
                measured[expert] = Measured(scales={linear: entry.input for linear, entry in part.items()})
    if (means := options.input_means) is not None:
        for expert, of_expert in read_inputs(means, source.spec).items():
            _check_weights(means, of_expert.weights, expert, (source, base))
            if expert in chosen:
                measured[expert] = Measured(inputs=of_expert.inputs, forwards=of_expert.forwards)
    return measured


def _warn_of_codes(expert: str, stored: Codes | Nvfp4 | None, precision: Precision) -> None:
    """Say so if the checkpoint's codes are rounded to those of another type."""
    number = {Codes: "fp8", Nvfp4: "nvfp4"}.get(type(stored))
    if number is not None and precision.linears != number:
        kept = f"--precision {number} would keep it bit for bit"
        log.warning(f"{expert} is stored in {number.upper()} and rounded again to {precision.linears.upper()}; {kept}")


def _kept_by_crest(
    measured: Mapping[str, Measured], precisions: Mapping[str, Precision], options: ExportOptions
) -> dict[str, Number]:
    """The linears that INT8 does not suit in one of the experts, so that all of these still share their engines.

    None, but a warning, unless ``options`` ask for them. Linears that these name are left alone.
    """
    peaked: dict[str, float] = {}
    for expert in (expert for expert in measured if precisions[expert].linears.smoothed):
        fp4 = fp4_kinds(precisions[expert], options)
        for kind, crest in too_peaked(measured[expert].inputs).items():
            if kind not in (*options.exceptions, *fp4):
                peaked[kind] = max(crest, peaked.get(kind, 0.0))
    if options.by_crest is not None:
        return dict.fromkeys(peaked, options.by_crest)
    if peaked:
        kinds = ", ".join(f"{kind} (crest {crest:.1f})" for kind, crest in peaked.items())
        log.warning(f"INT8 errs more than FP8 in {kinds}; --keep-high-precision auto keeps these out of it")
    return {}


def fp4_kinds(precision: Precision, options: ExportOptions) -> list[str]:
    """The kinds of linears ("ffn.2") that multiply NVFP4."""
    numbers = dict.fromkeys(LINEARS, precision.linears) | usual_exceptions(precision) | dict(options.exceptions)
    return [kind for kind in LINEARS if numbers[kind] is Number.NVFP4]


def _with(known: Measured, found: Mapping[str, MeasuredInput]) -> Measured:
    """``known`` with the rows of ``found``, and all of it for linears that are not known."""
    inputs = {linear: replace(known.inputs.get(linear, here), rows=here.rows) for linear, here in found.items()}
    return replace(known, inputs={**known.inputs, **inputs})


def _as_stored(known: Measured, weights: Weights, expert: str, kinds: Sequence[str], low_rank: int) -> Measured:
    """``known`` without factors for the ``kinds`` that the checkpoint has in NVFP4: its codes stay, bit for bit.

    A block whose matrix has another type, as the first and last ones of NVIDIA's releases, is quantised here.
    """
    blocks = {int(linear.split(".")[1]) for linear in known.inputs}
    stored: dict[str, set[int]] = {}
    for group in (group for group in SAME_INPUT if group[0] in kinds):
        for block in blocks:
            found = [weights.codes(f"blocks.{block}.{linear}.weight") for linear in group]
            if all(isinstance(codes, Nvfp4) for codes in found):
                stored.setdefault(group[0], set()).add(block)
    if stored and low_rank:
        told = f"{expert}: --low-rank {low_rank} adds zeros beside the checkpoint's own NVFP4 matrices"
        log.warning(f"{told}, which stay bit for bit")
    if others := sorted(set().union(*(blocks - of_kind for of_kind in stored.values()))):
        shown = ", ".join(map(str, others))
        told = f"{expert}: blocks {shown} are not NVFP4 in the checkpoint and are rounded now"
        log.warning(f"{told}; --keep-high-precision {shown} keeps them in 16 bits")
    inputs = {
        linear: replace(found, factor=None) if kind_of(linear) in stored else found
        for linear, found in known.inputs.items()
    }
    return replace(known, inputs=inputs)


def _check_weights(path: Path, scales: Scales, expert: str, sources: tuple[Checkpoint, Checkpoint]) -> None:
    merged_in, base = (source.weights[expert].read for source in sources)
    try:
        check_weights(path, scales, expert, merged_in)
    except UserError:
        check_weights(path, scales, expert, base)
