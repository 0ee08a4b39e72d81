"""Change the LoRAs of built engines in blocks, whose weights are in files.

The weights are made from the checkpoint again, with the LoRAs merged before rounding and quantisation, so they have the
same bytes as an export with these LoRAs. All other files are shared with the first bundle, not copied.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engines.block_build import slotted_stages
from engines.block_weights import attention_scales, layout_of, write_block_weights
from export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.hub import is_hub_name
from export.checkpoint.place import Place
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from export.shared_files import share
from runtime.signature import SIGNATURE
from wan22.block_layout import read_block_layout
from wan22.bundle import Bundle, open_bundle, refuse_existing, staged, write_manifest
from wan22.component import Component, File
from wan22.errors import UserError
from wan22.outputs import check_disk, check_no_source
from wan22.progress import Progress, silent


@dataclass(frozen=True)
class ApplyOptions:
    checkpoint: str | None = None  # its location now; None means the same as at the export
    overwrite: bool = False
    command: str = "wan_trt.apply_lora(...)"  # recorded in the manifest


def apply_lora(
    engines: Path,
    folder: Path,
    loras: Sequence[LoraChoice],
    options: ApplyOptions | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write the engine bundle ``folder``: the engines at ``engines`` with the weights of the checkpoint and ``loras``.

    Nothing is compiled. LoRAs that the engines had are replaced.

    Raises:
        UserError: ``folder`` is or holds an input, the engines have embedded weights, the checkpoint differs, a LoRA
            does not fit the model or outgrows the scales of Q and K, the disk is full. Nothing is written then.
    """
    options = options or ApplyOptions()
    refuse_existing(folder, "engines", overwrite=options.overwrite)
    old = open_bundle(engines, "engines")
    manifest = old.manifest
    checkpoint = options.checkpoint or manifest.source.checkpoint
    place = Place.parse(checkpoint)
    if options.checkpoint is None and not is_hub_name(checkpoint) and not all(path.exists() for path in place.paths):
        raise UserError(f"no {checkpoint}", "the checkpoint where the export read it", "name it with --checkpoint")
    check_no_source(folder, engines, *place.paths, *(lora.path for lora in loras))
    if not in_blocks(old):
        raise UserError(f"{engines} has embedded weights", "engines in blocks", "build with --topology blocks")
    check_disk(folder, 2 * sum(old.component(e).weights[1].size_bytes for e in manifest.spec.experts))
    with staged(folder, overwrite=options.overwrite) as temporary:
        with tempfile.TemporaryDirectory(dir=temporary) as scratch:
            merged = export_experts(old, checkpoint, loras, Path(scratch) / "onnx", progress)
            components = _replace_weights(old, merged, temporary, progress)
        found = merged.manifest
        manifest = replace(manifest, components=components, source=found.source, loras=found.loras)
        write_manifest(temporary, replace(manifest, command=options.command))
    return open_bundle(folder, "engines")


def in_blocks(bundle: Bundle) -> bool:
    return all(bundle.component(name).in_stages for name in bundle.manifest.spec.experts)


def export_experts(old: Bundle, where: str, loras: Sequence[LoraChoice], folder: Path, progress: Progress) -> Bundle:
    """The experts with the LoRAs, in the precisions of the engines, if ``where`` is the checkpoint of these."""
    manifest = old.manifest
    check_same_checkpoint(old, open_checkpoint(where, progress))
    size, frames = (manifest.size[:2], manifest.size[2]) if manifest.size else (None, None)
    built = [component for component in manifest.components if component.name in manifest.spec.experts]
    experts = {component.name: component.precision for component in built}
    options = ExportOptions(
        manifest.precision,
        experts,
        fp8_attention=_fp8_attention(old),
        exceptions={linear: number for component in built for linear, number in component.exceptions.items()},
        low_rank=max(component.low_rank for component in built),
        size=size,
        frames=frames,
        loras=tuple(loras),
        parts=frozenset(experts),
    )
    return export_checkpoint(where, folder, options, progress)


def check_same_checkpoint(engines: Bundle, opened: Checkpoint) -> None:
    """Raise UserError unless ``opened`` is what the engines were exported from, wherever it is now."""
    source, spec = engines.manifest.source, engines.manifest.spec
    if opened.source.fingerprint != source.fingerprint:
        found = f"{opened.source.checkpoint}, a {opened.spec.name}: not the checkpoint of the engines"
        raise UserError(found, f"that of {spec.name} at {source.checkpoint}", "name it with --checkpoint")


def _fp8_attention(old: Bundle) -> Literal["self", "cross"] | None:
    """The only attention that the engines compute in FP8; None for both or none."""
    scales = old.manifest.build.attention_scales if old.manifest.build else {}
    kinds = {name.split(".")[-2] for name in scales}
    return "self" if kinds == {"self_attn"} else "cross" if kinds == {"cross_attn"} else None


def check_attention(old: Bundle, merged: Bundle) -> None:
    """Refuse LoRAs that change norms so that Q or K need larger scales than the engines have."""
    built = old.manifest.build.attention_scales if old.manifest.build else {}
    graphs = [merged.path(component.graph) for component in merged.manifest.components]
    for name, scale in attention_scales(graphs).items():
        if scale > built.get(name, 0.0):
            expected = f"at most {built.get(name, 0.0):.3g}, as the engine was built for"
            raise UserError(f"{name} {scale:.3g} with these LoRAs", expected, "export and build again")


def _replace_weights(old: Bundle, merged: Bundle, folder: Path, progress: Progress) -> tuple[Component, ...]:
    """Write the experts' new weights to ``folder``, share other files with the old bundle; return the components."""
    experts = old.manifest.spec.experts
    renewed = {old.component(name).weights[1].path for name in experts}
    for file in [path for path in old.folder.rglob("*") if path.is_file() and path.name != SIGNATURE]:
        target = folder / file.relative_to(old.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            shutil.copyfile(file, target)
        elif target.relative_to(folder).as_posix() not in renewed:
            share(file, target)
    check_attention(old, merged)
    components = {component.name: component for component in old.manifest.components}
    for name in experts:
        layout, stale = components[name].weights
        written = write_blocks(old.path(layout), merged, name, folder / stale.path, progress)
        components[name] = replace(components[name], weights=(layout, written))
    return tuple(components.values())


def write_blocks(layout: Path, merged: Bundle, name: str, path: Path, progress: Progress) -> File:
    """Write the weights of an expert in blocks, if they have the ``layout`` of the engines."""
    component, expected = merged.component(name), read_block_layout(layout)
    stages = slotted_stages(component, expected.lora_rank)
    found = layout_of([stage for stage in stages if stage.groups == 1], merged.manifest.spec.dit.layers)
    if found != expected:
        raise UserError(f"weights of {name} with a layout other than {layout}", "the engines' layout", "build again")
    return write_block_weights(merged.path(component.graph), found, path, progress)
