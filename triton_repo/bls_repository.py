"""The repository of the BLS topology: one Triton model per engine, and one that calls them.

Version 1 of an engine's model is a link to the engine bundle, from which Triton's backends read the engine: nothing is
copied, and the weights stay next to their graph. Version 2 is Python, for machines without a GPU;
``--model-config-name=cpu`` selects it. Backends do not check the manifest, so keep the bundle read-only.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from triton_repo.config import add_instance, as_text, owner_config
from triton_repo.settings import Limits, Settings
from triton_repo.templates import place
from wan22.bundle import Bundle
from wan22.component import Component
from wan22.errors import UserError
from wan22.shapes import Profile, own_profiles, shape_of
from wan22.specs import PATCH, TEXT_TOKENS

CPU = "cpu"  # name of the variant
BACKENDS = ("tensorrt", "onnxruntime")  # Triton has no backend for TensorRT-RTX
USE_OWNER = "use --topology owner"
ENGINE_VERSION, PYTHON_VERSION = 1, 2
TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64"}
ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8}
WORKING_SHARE = 0.15  # fraction of GPU memory for activations, caches and contexts
GIBIBYTE = 2**30


def check_backends(bundle: Bundle) -> None:
    """Refuse engines that Triton's backends cannot run."""
    build = bundle.manifest.build
    backend = build.backend if build else None
    if backend not in BACKENDS:
        raise UserError(f"{backend} engines in topology bls", f"{' or '.join(BACKENDS)} engines", USE_OWNER)
    if any(component.in_stages for component in bundle.manifest.components):
        ways = {True: ("blocks", "--topology whole"), False: ("stages", "less: no --vae-strips")}
        what, how = ways[any(component.in_blocks for component in bundle.manifest.components)]
        raise UserError(f"engines in {what} in topology bls", "whole engines", f"{USE_OWNER}, or build with {how}")


def check_resident(bundle: Bundle, memory_gib: float) -> None:
    """Refuse engines that do not all fit into ``memory_gib`` of GPU memory (0: unknown), since all stay loaded."""
    weights = sum(file.size_bytes for file in bundle.manifest.files().values())
    room = memory_gib * GIBIBYTE * (1 - WORKING_SHARE)
    if memory_gib and weights > room:
        found = f"{weights / GIBIBYTE:.1f} GiB of engines, all resident in topology bls"
        remedy = f"{USE_OWNER}, a lower precision, or --gpu-memory of a larger GPU"
        raise UserError(found, f"at most {room / GIBIBYTE:.1f} of {memory_gib:g} GiB", remedy)


def write_bls(repository: Path, name: str, bundle: Bundle, settings: Settings) -> None:
    """Write the pipeline model ``name`` and a model ``name_component`` for each component of ``bundle``."""
    calling = replace(settings, components=name, warm_up=False)
    place("bls", repository / name / "1")
    (repository / name / "config.pbtxt").write_text(as_text(owner_config(name, calling, on_gpu=False)))
    build = bundle.manifest.build
    for component in bundle.manifest.components:
        profiles = own_profiles(build.profiles if build else (), component.inputs)
        _write_engine(repository / f"{name}_{component.name}", component, settings, profiles)


def _write_engine(model: Path, component: Component, settings: Settings, profiles: Sequence[Profile]) -> None:
    model.mkdir()
    (model / "config.pbtxt").write_text(as_text(backend_config(model.name, component, profiles)))
    (model / str(ENGINE_VERSION)).symlink_to(settings.engines)
    if not _is_onnx(component):
        return
    own = replace(settings, component=component.name)
    (model / "configs").mkdir()
    (model / "configs" / f"{CPU}.pbtxt").write_text(as_text(python_config(model.name, component, own)))
    place("component", model / str(PYTHON_VERSION))


def backend_config(name: str, component: Component, profiles: Sequence[Profile] = ()) -> Any:
    """The configuration for Triton's TensorRT or ONNX Runtime backend on a GPU; ``profiles`` are the plan's."""
    config = _engine_config(name, component, ENGINE_VERSION)
    config.default_model_filename = component.graph.path
    add_instance(config, on_gpu=True)
    if _is_onnx(component):
        config.backend = "onnxruntime"
    else:
        config.platform, config.backend = "tensorrt_plan", "tensorrt"
        config.instance_group[0].profile.extend(str(index) for index in range(len(profiles)))
    return config


def python_config(name: str, component: Component, settings: Settings) -> Any:
    """The configuration for the Python model that replaces it on machines without a GPU."""
    config = _engine_config(name, component, PYTHON_VERSION)
    config.backend = "python"
    add_instance(config, on_gpu=False)
    for key, value in settings.parameters().items():
        config.parameters[key].string_value = value
    return config


def _engine_config(name: str, component: Component, version: int) -> Any:
    """The name, version and tensors. Batching is off, so all dimensions are listed; named ones are -1."""
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig(name=name, max_batch_size=0)
    config.version_policy.specific.versions.append(version)
    for side, tensors in ((config.input, component.inputs), (config.output, component.outputs)):
        for tensor in tensors:
            data_type = model_config_pb2.DataType.Value(f"TYPE_{TYPES[tensor.dtype]}")
            dims = [dim if isinstance(dim, int) else -1 for dim in tensor.dims]
            side.add(name=tensor.name, data_type=data_type, dims=dims)
    return config


def largest_call_bytes(bundle: Bundle, limits: Limits) -> int:
    """The most bytes that one engine call moves through shared memory, in and out, for the largest allowed video."""
    spec = bundle.manifest.spec
    side = int(limits.max_pixels**0.5) // spec.vae.spatial_stride + 1
    frames = 1 + (limits.max_frames - 1) // spec.vae.temporal_stride
    sizes = {"frames": frames, "height": side, "width": side, "tokens": TEXT_TOKENS}
    sizes |= {"rows": side // PATCH[1], "columns": side // PATCH[2]}
    return max(
        sum(prod(shape_of(t, sizes)) * ITEM_BYTES[t.dtype] for t in (*component.inputs, *component.outputs))
        for component in bundle.manifest.components
    )


def _is_onnx(component: Component) -> bool:
    return component.graph.path.endswith(".onnx")
