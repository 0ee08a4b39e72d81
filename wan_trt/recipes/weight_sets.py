"""Named LoRAs → weight sets that a server switches between: the experts of the same engines, merged once."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines.build import BuildOptions, build_engines
from export.lora.merge import LoraChoice, parse_lora
from runtime.pipeline import Pipeline
from runtime.weight_sets import lora_slots
from wan22.backends import runs_graphs
from wan22.bundle import Bundle, file_entry, open_bundle, write_manifest
from wan22.errors import UserError
from wan22.outputs import check_disk
from wan22.progress import Progress, silent
from wan_trt.recipes.apply_lora import check_attention, export_experts, in_blocks, write_blocks
from wan_trt.recipes.lora_slots import refuse_merged, write_slot_set

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SYNTAX = "NAME=FILE[:EXPERT[:STRENGTH]]"


def parse_named(arguments: Sequence[str]) -> dict[str, tuple[LoraChoice, ...]]:
    """The LoRAs of every name in ``NAME=FILE[:EXPERT[:STRENGTH]]`` (:func:`parse_lora`); a name given twice has both.

    Raises:
        UserError: an argument is written differently.
    """
    found: dict[str, tuple[LoraChoice, ...]] = {}
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        if not equals or not NAME.fullmatch(name) or not rest:
            raise UserError(f"--lora {argument!r}", SYNTAX, "begin with a name of letters, digits, '.', '-' and '_'")
        found[name] = (*found.get(name, ()), parse_lora(rest, f"--lora {argument!r}", SYNTAX))
    return found


def make_weight_sets(
    engines: Path,
    folder: Path,
    loras: Mapping[str, Sequence[LoraChoice]],
    checkpoint: str | None = None,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Write a weight set for every name into ``folder``; return their folders by name.

    The weights are those of an export with these LoRAs: merged into the checkpoint, then rounded. Engines with slots
    get the LoRAs beside their weights.

    Raises:
        UserError: the engines have embedded weights, merged LoRAs or are quantised graphs, the checkpoint differs, a
            LoRA does not fit, the disk is full.
    """
    if not loras:
        return {}
    base = open_bundle(engines, "engines")
    build, precisions = base.manifest.build, {component.precision for component in base.manifest.components}
    blocks = in_blocks(base)
    graphs = build is not None and runs_graphs(build.backend) and not blocks
    if graphs and any(precision.quantised for precision in precisions):
        found = f"--lora with {base.manifest.precision_text} engines for ONNX Runtime"
        raise UserError(found, "weights of 16 or 32 bits", "export again in a wider precision")
    if not graphs and not blocks:
        raise UserError(f"{engines} has embedded weights", "engines in blocks", "build with --topology blocks")
    refuse_merged(base)
    if lora_slots(base.manifest):
        return {name: write_slot_set(base, each, folder / name, checkpoint, progress) for name, each in loras.items()}
    experts = [base.component(name) for name in base.manifest.spec.experts]
    size_bytes = sum(file.size_bytes for component in experts for file in component.weights)
    check_disk(folder / "set", (len(loras) + 1) * size_bytes)
    where, made = checkpoint or base.manifest.source.checkpoint, {}
    for name, choices in loras.items():
        merged = export_experts(base, where, choices, folder / f"{name}-onnx", progress)
        made[name] = folder / name
        if graphs and build is not None:
            options = BuildOptions(build.target, command=f"wan-trt serve --lora {name}=...")
            build_engines(merged.folder, made[name], options, progress)
        else:
            _write_set(base, merged, made[name], progress)
        shutil.rmtree(merged.folder)
    return made


def added_set(
    pipeline: Pipeline,
    choices: Sequence[LoraChoice],
    folder: Path,
    checkpoint: str | None = None,
    progress: Progress = silent,
) -> str:
    """The name of the weight set of ``choices``, which ``pipeline`` gets unless it has it; made in ``folder``.

    Raises:
        UserError: see :func:`make_weight_sets`.
    """
    digest = hashlib.sha256()
    for each in choices:
        status = each.path.stat()
        digest.update(repr((each, status.st_mtime_ns, status.st_size)).encode())
    name = f"set-{digest.hexdigest()[:16]}"
    if name not in pipeline.weight_sets.names:
        place = Path(tempfile.mkdtemp(dir=folder))
        made = make_weight_sets(pipeline.bundle.folder, place, {name: choices}, checkpoint, progress)
        pipeline.weight_sets.add(name, open_bundle(made[name], "engines"))
    return name


def _write_set(base: Bundle, merged: Bundle, folder: Path, progress: Progress) -> None:
    """A bundle of the experts: stages and layout of ``base``, weights of ``merged``."""
    folder.mkdir(parents=True)
    check_attention(base, merged)
    components = []
    for name in base.manifest.spec.experts:
        component = base.component(name)
        layout, stale = component.weights
        for file in (*(stage.graph for stage in component.stages), layout):
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path(file), folder / file.path)
        written = write_blocks(base.path(layout), merged, name, folder / stale.path, progress)
        components.append(replace(component, weights=(layout, written)))
    tokenizer = []
    for file in merged.manifest.tokenizer:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(merged.path(file), folder / file.path)
        tokenizer.append(file_entry(folder, folder / file.path))
    manifest = replace(
        base.manifest, components=tuple(components), tokenizer=tuple(tokenizer), loras=merged.manifest.loras
    )
    write_manifest(folder, manifest)
