"""What a bundle without compiled kernels holds, and a file of weights that belongs to engines."""

from pathlib import Path
from typing import Any

from wan22.backends import runs_graphs
from wan22.block_layout import read_block_layout
from wan22.bundle import MANIFEST, Bundle, kind_of, open_bundle, read_manifest
from wan22.component import Component
from wan22.errors import UserError
from wan22.quantities import human_bytes

WEIGHTS = ".weights"


def contents(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An entry for the bundle at ``folder``, and one for each component that has no compiled kernels.

    Raises:
        UserError: the bundle is damaged.
    """
    bundle = open_bundle(folder, kind_of(folder))
    manifest, build = bundle.manifest, bundle.manifest.build
    made = f"engines for {build.target} ({build.backend} {build.backend_version})" if build else "ONNX graphs"
    whole: dict[str, Any] = {
        "path": str(folder),
        "is": f"{made} of {manifest.spec.name}, {manifest.precision_text}",
        "size": human_bytes(sum(file.size_bytes for file in manifest.files().values())),
        "source": f"{manifest.source.checkpoint} ({manifest.source.layout})",
        "preset": manifest.spec.sampling.preset,
    }
    if manifest.size is not None:
        whole["shapes"] = "{}x{}, {} frames".format(*manifest.size)
    if build is not None and (rank := build.options.get("lora_slots")):
        whole["LoRA slots"] = f"of rank {rank}, for --lora"
    if manifest.loras:
        whole["LoRAs"] = [lora.shown(manifest.spec) for lora in manifest.loras]
    if build is not None and not runs_graphs(build.backend):
        return whole, []
    return whole, [_component(bundle, component) for component in manifest.components]


def _component(bundle: Bundle, component: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "path": str(bundle.path(component.graph)),
        "is": f"{component.name} in {component.precision}",
        "inputs": [
            f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.dims))}]"
            for tensor in component.inputs
            if not tensor.name.startswith("cache_")
        ],
        "weights": human_bytes(sum(file.size_bytes for file in component.weights)),
    }
    others = [each for each in bundle.manifest.components if each is not component]
    if sharing := [each.name for each in others if set(each.weights) & set(component.weights)]:
        entry["weights"] += f", shared with {', '.join(sharing)}"
    if component.low_rank:
        entry["branches"] = f"of rank {component.low_rank} in 16 bits, beside NVFP4"
    if component.in_stages:
        entry["stages"] = [stage.name for stage in component.stages]
    return entry | ({"why": component.why_higher} if component.why_higher else {})


def weights_contents(path: Path) -> dict[str, Any]:
    """An entry for the file of weights of engines at ``path``, which lies in their bundle.

    Raises:
        UserError: no bundle around it names the file.
    """
    for folder in path.absolute().parents[:2]:
        if not (folder / MANIFEST).is_file():
            continue
        bundle = Bundle(folder, read_manifest(folder, kind_of(folder)))
        for component in bundle.manifest.components:
            if any(bundle.path(file) == path.absolute() for file in component.weights):
                return _weights(bundle, component, path)
    raise UserError(
        f"{path} is in no bundle", "the weights of engines beside their bundle.json", "inspect their folder"
    )


def _weights(bundle: Bundle, component: Component, path: Path) -> dict[str, Any]:
    layout = bundle.path(component.weights[0])
    found = read_block_layout(layout)
    each = f"{len(found.block)} tensors, {human_bytes(found.block_bytes)}"
    held = f"{found.blocks} blocks of {each}, and {len(found.ends)} tensors around them"
    return {
        "path": str(path),
        "is": f"the weights of {component.name} of {bundle.manifest.spec.name} in {component.precision}",
        "size": human_bytes(path.stat().st_size),
        "holds": held,
        "bundle": str(bundle.folder),
    }
