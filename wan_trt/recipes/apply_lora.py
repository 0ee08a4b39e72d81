"""Change the LoRAs of built engines whose weights are outside (``--topology blocks``, ``--weights external``).

The weights are made from the checkpoint again, with the LoRAs merged before rounding and quantisation, so they have the
same bytes as an export with these LoRAs. All other files are shared with the first bundle, not copied.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engines.block_weights import attention_scales, layout_of, write_block_weights
from engines.gpu.external_weights import attention_scales_of, check_layout, externalise, write_weights
from export.checkpoint.place import Place
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from export.shared_files import share
from runtime.signature import SIGNATURE
from wan22.bundle import Bundle, Component, File, open_bundle, refuse_existing, staged, write_manifest
from wan22.errors import UserError
from wan22.external_layout import read_block_layout, read_layout
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
        UserError: ``folder`` is or holds an input, the engines have embedded weights or input means, the checkpoint
            differs, a LoRA does not fit the model or outgrows the scales of Q and K, the disk is full. Nothing is
            written then.
    """
    options = options or ApplyOptions()
    refuse_existing(folder, "engines", overwrite=options.overwrite)
    old = open_bundle(engines, "engines")
    manifest = old.manifest
    checkpoint = options.checkpoint or manifest.source.checkpoint
    check_no_source(folder, engines, *Place.parse(checkpoint).paths, *(lora.path for lora in loras))
    outside = manifest.build is not None and manifest.build.options.get("weights") == "external"
    if not (outside or _in_blocks(old)):
        raise UserError(f"{engines} has embedded weights", "engines with external weights", "build or export again")
    check_disk(folder, 2 * sum(old.component(e).weights[1].size_bytes for e in manifest.spec.experts))
    with staged(folder, overwrite=options.overwrite) as temporary:
        with tempfile.TemporaryDirectory(dir=temporary) as place:
            merged = export_experts(old, checkpoint, loras, Path(place) / "onnx", progress)
            components = _replace_weights(old, merged, temporary, progress)
        manifest = replace(manifest, components=components, loras=merged.manifest.loras, command=options.command)
        write_manifest(temporary, manifest)
    return Bundle(folder, manifest)


def _in_blocks(bundle: Bundle) -> bool:
    return any(component.in_stages for component in bundle.manifest.components)


def export_experts(old: Bundle, where: str, loras: Sequence[LoraChoice], folder: Path, progress: Progress) -> Bundle:
    """The experts with the LoRAs, in the precisions of the engines."""
    manifest = old.manifest
    size, frames = (manifest.size[:2], manifest.size[2]) if manifest.size else (None, None)
    experts = {c.name: c.precision for c in manifest.components if c.name in manifest.spec.experts}
    options = ExportOptions(
        manifest.precision,
        experts,
        fp8_attention=_fp8_attention(old),
        keep_high_precision=_blocks_without_fp8(old) if manifest.precision.quantised else frozenset(),
        size=size,
        frames=frames,
        loras=tuple(loras),
        parts=frozenset(experts),
    )
    bundle = export_checkpoint(where, folder, options, progress)
    if bundle.manifest.source.fingerprint != manifest.source.fingerprint:
        found = f"{where}: not the checkpoint of the engines"
        raise UserError(found, manifest.source.checkpoint, "name it with --checkpoint")
    return bundle


def _blocks_without_fp8(old: Bundle) -> frozenset[int]:
    """The blocks without FP8 weights in the engines; an FP8 matrix has a scale.

    Raises:
        UserError: the engines subtract input means that were measured without the LoRAs.
    """
    spec = old.manifest.spec
    first = old.component(spec.experts[0])
    if first.in_stages:  # all blocks compute alike
        return frozenset()
    names = {place.name for place in read_layout(old.path(first.weights[0]))}
    if any(name.endswith(".input_mean") for name in names):
        found = f"{old.folder}: engines with input means, measured without these LoRAs"
        expected = "engines without means, or an export with the LoRAs"
        raise UserError(found, expected, "export with --lora and build again")
    fp8 = {int(name.split(".")[1]) for name in names if name.endswith(".weight_scale")}
    return frozenset(range(spec.dit.layers)) - fp8 if fp8 else frozenset()


def _fp8_attention(old: Bundle) -> Literal["both", "self", "cross"]:
    """The attention that the engines compute in FP8; "both" if none."""
    scales = old.manifest.build.attention_scales if old.manifest.build else {}
    kinds = {name.split(".")[-2] for name in scales}
    return "self" if kinds == {"self_attn"} else "cross" if kinds == {"cross_attn"} else "both"


def check_attention(old: Bundle, merged: Bundle) -> dict[str, float]:
    """The engine's scales of Q and K.

    Raises:
        UserError: the LoRAs change norms so that larger scales are needed.
    """
    built = old.manifest.build.attention_scales if old.manifest.build else {}
    graphs = [merged.path(component.graph) for component in merged.manifest.components]
    needed = attention_scales(graphs) if _in_blocks(old) else attention_scales_of(graphs)
    for name, scale in needed.items():
        if scale > built.get(name, 0.0):
            expected = f"at most {built.get(name, 0.0):.3g}, as the engine was built for"
            raise UserError(f"{name} {scale:.3g} with these LoRAs", expected, "export and build again")
    return built


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
    scales = check_attention(old, merged)
    components = {component.name: component for component in old.manifest.components}
    for name in experts:
        layout, stale = components[name].weights
        if components[name].in_stages:
            written = _write_blocks(old.path(layout), merged, name, folder / stale.path, progress)
            components[name] = replace(components[name], weights=(layout, written))
            continue
        _, weights = externalise(merged.path(merged.component(name).graph), scales)
        check_layout(old.path(layout), weights)
        written = write_weights(merged.folder, weights, folder / stale.path, progress)
        components[name] = replace(components[name], weights=(layout, written))
    return tuple(components.values())


def _write_blocks(layout: Path, merged: Bundle, name: str, path: Path, progress: Progress) -> File:
    """Write the weights of an expert in blocks, if they have the ``layout`` of the engines."""
    component = merged.component(name)
    found = layout_of(component.stages, merged.manifest.spec.dit.layers)
    if found != read_block_layout(layout):
        raise UserError(f"weights of {name} with a layout other than {layout}", "the engines' layout", "build again")
    return write_block_weights(merged.path(component.graph), found, path, progress)
