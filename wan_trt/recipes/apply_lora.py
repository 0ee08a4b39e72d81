"""Other LoRAs for engines that are built, where their weights are outside (``--weights external``).

The weights are made from the checkpoint again, LoRAs merged before anything is rounded or quantised: the same bytes as
an export with them. The engine and everything else are shared with the first bundle, not copied.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engines.gpu.external_weights import attention_scales_of, check_layout, externalise, write_weights
from export.exporter import export_checkpoint
from export.lora.merge import LoraChoice
from export.options import ExportOptions
from export.shared_files import share
from runtime.signature import SIGNATURE
from wan22.bundle import Bundle, Component, check_disk, open_bundle, refuse_existing, staged, write_manifest
from wan22.errors import UserError
from wan22.external_layout import read_layout
from wan22.progress import Progress, silent


@dataclass(frozen=True)
class ApplyOptions:
    checkpoint: str | None = None  # where the checkpoint is now; None: where it was at the export
    overwrite: bool = False
    command: str = "wan_trt.apply_lora(...)"  # recorded in the manifest


def apply_lora(
    engines: Path,
    folder: Path,
    loras: Sequence[LoraChoice],
    options: ApplyOptions | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Writes the engine bundle ``folder``: the engines at ``engines`` with the weights of the checkpoint and ``loras``.

    Nothing is compiled. LoRAs that the engines had are replaced.

    Raises:
        UserError: engines whose weights are inside, another checkpoint, a LoRA that does not fit the model, input means
            or scales of Q and K that the LoRAs would make wrong, a full disk. Nothing is left behind then.
    """
    options = options or ApplyOptions()
    refuse_existing(folder, "engines", overwrite=options.overwrite)
    old = open_bundle(engines, "engines")
    manifest = old.manifest
    if manifest.build is None or manifest.build.options.get("weights") != "external":
        raise UserError(f"{engines} has its weights inside", "engines with external weights", "build or export again")
    check_disk(folder, 2 * sum(old.component(e).weights[1].size_bytes for e in manifest.spec.experts))
    checkpoint = options.checkpoint or manifest.source.checkpoint
    with staged(folder, overwrite=options.overwrite) as temporary:
        with tempfile.TemporaryDirectory(dir=temporary) as place:
            merged = _exported(old, checkpoint, loras, Path(place) / "onnx", progress)
            components = _replaced(old, merged, temporary, progress)
        manifest = replace(manifest, components=components, loras=merged.manifest.loras, command=options.command)
        write_manifest(temporary, manifest)
    return Bundle(folder, manifest)


def _exported(old: Bundle, where: str, loras: Sequence[LoraChoice], folder: Path, progress: Progress) -> Bundle:
    """The experts with the LoRAs, in the precisions of the engines."""
    manifest = old.manifest
    size, frames = (manifest.size[:2], manifest.size[2]) if manifest.size else (None, None)
    experts = {c.name: c.precision for c in manifest.components if c.name in manifest.spec.experts}
    options = ExportOptions(
        manifest.precision,
        experts,
        fp8_attention=_fp8_attention(old),
        keep_high_precision=_blocks_without_fp8(old),
        size=size,
        frames=frames,
        loras=tuple(loras),
        parts=frozenset(experts),
    )
    bundle = export_checkpoint(where, folder, options, progress)
    if bundle.manifest.source.fingerprint != manifest.source.fingerprint:
        found = f"{where}: another checkpoint than that of the engines"
        raise UserError(found, manifest.source.checkpoint, "name it with --checkpoint")
    return bundle


def _blocks_without_fp8(old: Bundle) -> frozenset[int]:
    """Read off the weights that the engines take: a matrix in FP8 has a scale.

    Raises:
        UserError: the engines subtract means that were measured without the LoRAs.
    """
    spec = old.manifest.spec
    first = old.component(spec.experts[0])
    names = {place.name for place in read_layout(old.path(first.weights[0]))}
    if any(name.endswith(".input_mean") for name in names):
        found = f"{old.folder}: engines with input means, measured without these LoRAs"
        raise UserError(found, "engines without, or an export with the LoRAs", "export with --lora and build again")
    fp8 = {int(name.split(".")[1]) for name in names if name.endswith(".weight_scale")}
    return frozenset(range(spec.dit.layers)) - fp8 if fp8 else frozenset()


def _fp8_attention(old: Bundle) -> Literal["both", "self", "cross"]:
    """Which attention of the engines is in FP8, of those that have any."""
    scales = old.manifest.build.attention_scales if old.manifest.build else {}
    kinds = {name.split(".")[2] for name in scales}
    return "self" if kinds == {"self_attn"} else "cross" if kinds == {"cross_attn"} else "both"


def _check_attention(old: Bundle, merged: Bundle) -> dict[str, float]:
    """The engine's scales of Q and K, which LoRAs that change norms may outgrow.

    Raises:
        UserError: they do.
    """
    built = old.manifest.build.attention_scales if old.manifest.build else {}
    wanted = attention_scales_of(merged.path(component.graph) for component in merged.manifest.components)
    for name, scale in wanted.items():
        if scale > built.get(name, 0.0):
            found = f"{name} {scale:.3g} with these LoRAs"
            raise UserError(
                found, f"{built.get(name, 0.0):.3g}, for which the engine is built", "export and build again"
            )
    return built


def _replaced(old: Bundle, merged: Bundle, folder: Path, progress: Progress) -> tuple[Component, ...]:
    """The components, experts with new weights, in ``folder``; other files are shared with the old bundle."""
    experts = old.manifest.spec.experts
    renewed = {old.component(name).weights[1].path for name in experts}
    for file in [path for path in old.folder.rglob("*") if path.is_file() and path.name != SIGNATURE]:
        target = folder / file.relative_to(old.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            shutil.copyfile(file, target)
        elif target.relative_to(folder).as_posix() not in renewed:
            share(file, target)
    scales = _check_attention(old, merged)
    components = {component.name: component for component in old.manifest.components}
    for name in experts:
        layout, stale = components[name].weights
        _, weights = externalise(merged.path(merged.component(name).graph), scales)
        check_layout(old.path(layout), weights)
        written = write_weights(merged.folder, weights, folder / stale.path, progress)
        components[name] = replace(components[name], weights=(layout, written))
    return tuple(components.values())
