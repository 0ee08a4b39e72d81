"""Checkpoint → ONNX bundle: author the graphs, stream the weights, write the manifest."""

import hashlib
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.place import Place
from export.component import ExportPart
from export.files.resumable import Journal, kept_bytes, resumable_folder
from export.graphs.blocks import StageGraph, stage_graphs
from export.graphs.builder import GraphBuilder, Placed
from export.graphs.dit import LatentDims, dit_graph
from export.graphs.linear import Quantised
from export.graphs.text_encoder import text_encoder_graph, text_stages
from export.graphs.vae_decoder import decoder_stage, vae_decoder
from export.graphs.vae_encoder import encoder_stage, vae_encoder
from export.graphs.weights_file import placements, write_weights
from export.lora.merge import Lora, merged, open_lora
from export.measured import Measured, read_measured
from export.options import ExportOptions
from export.precisions import (
    check_quantised,
    compute_type,
    precisions_of,
    quantised_of,
    used_inputs,
    why_higher,
)
from export.shared_files import share, shared_name, shared_placements
from wan22.bundle import Bundle, Manifest, file_entry, refuse_existing, write_manifest
from wan22.component import Component, File, Stage
from wan22.errors import UserError
from wan22.outputs import check_disk, check_no_source
from wan22.precision import Precision, check_low_rank
from wan22.progress import Progress, silent
from wan22.specs import ModelSpec
from wan22.strips import VAE_STAGES

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


def export_checkpoint(
    checkpoint: str | Path, folder: Path, options: ExportOptions | None = None, progress: Progress = silent
) -> Bundle:
    """Write the ONNX bundle of ``checkpoint`` (a folder of any layout, single files or a hub name) to ``folder``.

    Raises:
        UserError: the checkpoint, the options or the disk are unsuitable. Nothing is left behind; a killed or
            interrupted export leaves a hidden folder, from which the next export of the same input resumes.
    """
    options = options or ExportOptions()
    check_low_rank(options.low_rank, {each.linears for each in (options.precision, *options.precisions.values())})
    refuse_existing(folder, "graphs", overwrite=options.overwrite)
    measured = (options.input_scales, options.input_means)
    check_no_source(folder, *Place.parse(checkpoint).paths, *(lora.path for lora in options.loras), *measured)
    opened = open_checkpoint(checkpoint, progress)
    loras = [open_lora(lora, opened.spec, ignore_unmatched=options.lora_ignore_unmatched) for lora in options.loras]
    for warning in (warning for lora in loras for warning in lora.warnings):
        log.warning(warning)
    experts = {name: merged(opened.weights[name], loras, name) for name in opened.spec.experts}
    source = replace(opened, weights={**opened.weights, **experts})
    if options.preset is not None:
        source = replace(source, spec=source.spec.with_preset(options.preset))
    check_quantised(source.spec, options)
    parts = _parts(source.spec, options, read_measured(source, opened, options, progress))
    parts = {name: part for name, part in parts.items() if not options.parts or name in options.parts}
    if options.link:
        parts = {name: part.share(source.weights[part.weights]) for name, part in parts.items()}
    meter = _Meter(progress, parts.values())
    if not options.sparse:
        check_disk(folder, meter.written_bytes - kept_bytes(folder))
    resumable = resumable_folder(folder, _input_hash(source, loras, parts), overwrite=options.overwrite)
    with resumable as (temporary, journal):
        writer = _Writer(temporary, source, options, meter, journal)
        components = [component for name, part in parts.items() for component in writer.components(name, part)]
        manifest = Manifest(
            kind="graphs",
            spec=source.spec,
            precision=options.precision,
            components=tuple(c for name in source.spec.components for c in components if c.name == name),
            tokenizer=_copy_tokenizer(source.tokenizer, temporary),
            source=source.source,
            command=options.command,
            size=_fixed_size(options),
            loras=tuple(lora.record() for lora in loras),
        )
        write_manifest(temporary, manifest)
    return Bundle(folder, manifest)


def _fixed_size(options: ExportOptions) -> tuple[int, int, int] | None:
    if (options.size is None) != (options.frames is None):
        expected = "both for fixed shapes or neither for dynamic ones"
        raise UserError("only one of --size and --frames", expected, "give both or leave both out")
    return None if options.size is None or options.frames is None else (*options.size, options.frames)


def _parts(spec: ModelSpec, options: ExportOptions, measured: Mapping[str, Measured]) -> dict[str, ExportPart]:
    """The parts of the model by the name of their weights file."""
    size, precisions = _fixed_size(options), precisions_of(spec, options)
    shape = spec.latent_shape(*size) if size else None
    compute = {part: compute_type(precision) for part, precision in precisions.items()}
    text_in_fp8 = precisions["text_encoder"].quantised
    text = text_encoder_graph(spec.text_encoder, compute["text_encoder"], fp8_feed_forward=text_in_fp8)
    layers = text_stages(spec.text_encoder, compute["text_encoder"], fp8_feed_forward=text_in_fp8)
    parts = {"text_encoder": ExportPart("text_encoder", precisions["text_encoder"], {"text_encoder": text}, layers)}
    dims = LatentDims(*shape[2:]) if shape else LatentDims()
    parts |= _expert_parts(spec, options, measured, dims)
    for coder, vae, stage in (
        ("vae_encoder", vae_encoder, encoder_stage),
        ("vae_decoder", vae_decoder, decoder_stage),
    ):
        chunks = {name: name == f"{coder}_first" for name in spec.components if name.startswith(coder)}
        latent_size = shape[3:] if shape else None
        graphs = {name: vae(spec.vae, first, compute[coder], latent_size) for name, first in chunks.items()}
        stages = {}
        if latent_size is None:  # strips have other sizes
            author = cache(partial(stage, spec.vae, compute=compute[coder]))
            stages = {
                name: {each: author(each, first=first and each == "motion") for each in VAE_STAGES}
                for name, first in chunks.items()
            }
        if graphs:
            parts[coder] = ExportPart("vae", precisions[coder], graphs, vae_stages=stages)
    return parts


def _expert_parts(
    spec: ModelSpec, options: ExportOptions, measured: Mapping[str, Measured], dims: LatentDims
) -> dict[str, ExportPart]:
    """The experts as parts. Experts with equal settings share one graph, bound to the weights of each in turn."""
    precisions, parts = precisions_of(spec, options), {}
    authored: list[tuple[Precision, Quantised | None, GraphBuilder, dict[str, StageGraph]]] = []
    for expert in spec.experts:
        known, precision = measured.get(expert, Measured()), precisions[expert]
        kept = replace(options, keep_high_precision=options.keep_high_precision | known.wide_blocks)
        quantised = quantised_of(precision, kept, known.exceptions, known.scales, known.inputs)
        alike = [made for made in authored if made[:2] == (precision, quantised)]
        if not alike:
            compute = compute_type(precision)
            stages = stage_graphs(spec.dit, compute, quantised) if quantised is None or quantised.uniform else {}
            alike = [(precision, quantised, dit_graph(spec.dit, compute, dims, quantised), stages)]
            authored += alike
        *_, graph, stages = alike[0]
        measurements = known.exceptions, known.scales, used_inputs(quantised, known.inputs)
        low_rank = 0 if quantised is None else quantised.low_rank
        parts[expert] = ExportPart(expert, precision, {expert: graph}, stages, *measurements, low_rank)
    return parts


class _Meter:
    """Sum the stored bytes of all files for one progress bar."""

    def __init__(self, progress: Progress, parts: Collection[ExportPart]) -> None:
        self.written_bytes = sum(planned.size_bytes for part in parts for planned in part.written.values())
        shared_bytes = sum(path.stat().st_size for part in parts for path in part.shared_files)
        self._progress, self._done, self._total = progress, 0, self.written_bytes + shared_bytes

    def __call__(self, _key: str, size_bytes: int) -> None:
        self._done += size_bytes
        self._progress("export weights", self._done, self._total, "bytes")


@dataclass(frozen=True)
class _Writer:
    """Write the parts of one bundle. Experts with the same stages share their files."""

    folder: Path
    source: Checkpoint
    options: ExportOptions
    meter: _Meter
    journal: Journal
    written_stages: dict[int, tuple[Stage, ...]] = field(default_factory=dict)

    def components(self, name: str, part: ExportPart) -> list[Component]:
        files, placed = self.weights(name, part)
        components = []
        for component, graph in part.graphs.items():
            graph.bind(placed, self.folder)
            graph.save(self.folder / f"{component}.onnx")
            entry = file_entry(self.folder, self.folder / f"{component}.onnx")
            why = why_higher(name, part.precision, self.options, part.exceptions)
            edges, stages = graph.edges(), self.stages(name, part)
            stages += tuple(self.vae_stage(g, placed) for g in part.vae_stages.get(component, {}).items())
            kept, precision, rank = dict(part.exceptions), part.precision, part.low_rank
            made = Component(component, entry, files, *edges, precision, why, kept, low_rank=rank, stages=stages)
            components.append(made)
        return components

    def stages(self, name: str, part: ExportPart) -> tuple[Stage, ...]:
        if (key := id(part.stages)) not in self.written_stages:
            found = []
            for stage, graph in part.stages.items():
                graph.edges()
                path = self.folder / f"{name}.{stage}.onnx"
                graph.save(path)
                found.append(graph.stage(file_entry(self.folder, path)))
            self.written_stages[key] = tuple(found)
        return self.written_stages[key]

    def vae_stage(self, named: tuple[str, GraphBuilder], placed: dict[str, Placed]) -> Stage:
        """Write a stage of the VAE, which points into the weights of its half."""
        stage, graph = named
        path = self.folder / f"{graph.graph.name}.onnx"
        graph.bind(placed, self.folder)
        graph.save(path)
        return Stage(stage, file_entry(self.folder, path), *graph.edges(), ())

    def weights(self, name: str, part: ExportPart) -> tuple[tuple[File, ...], dict[str, Placed]]:
        """Write the part's files; return their entries and the position of each tensor."""
        location, files = f"{name}.safetensors", []
        if part.written:
            pieces = part.pieces(self.source)
            files.append(write_weights(self.folder / location, part.written, pieces, self.meter, self.journal))
        for path in part.shared_files:
            target = self.folder / shared_name(name, path)
            share(path, target)
            files.append(file_entry(self.folder, target))
            self.meter(path.name, files[-1].size_bytes)
        return tuple(files), placements(location, part.written) | shared_placements(name, part.shared)


def _input_hash(source: Checkpoint, loras: Sequence[Lora], parts: Mapping[str, ExportPart]) -> str:
    """A hash of everything that determines the weights' bytes; a source file with a new mtime counts as changed."""
    times = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    stored = {name: (part.written, dict(part.input_scales)) for name, part in parts.items()}
    vectors = {name: [(x.mean, x.factor) for x in part.inputs.values()] for name, part in parts.items()}
    means = {name: [v.tobytes() for pair in both for v in pair if v is not None] for name, both in vectors.items()}
    inputs = (source.source.fingerprint, times, [lora.record() for lora in loras], stored, means)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


def _copy_tokenizer(source: Path, folder: Path) -> tuple[File, ...]:
    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if TOKENIZER_FILES[0] not in found:
        missing = f"{source} has no {TOKENIZER_FILES[0]}"
        raise UserError(missing, "the tokenizer of umt5", "copy it from google/umt5-xxl")
    for name in found:
        shutil.copyfile(source / name, target / name)
    return tuple(file_entry(folder, target / name) for name in found)
