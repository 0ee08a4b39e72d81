"""Open the engines of a bundle with the backend that it was built for."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.block_backend import BlockBackend, BlockOptions
from runtime.engine import Engine
from wan22.backends import MODULES
from wan22.block_layout import BlockLayout
from wan22.bundle import Bundle, Component
from wan22.errors import UserError
from wan22.memory import available_host_bytes

if TYPE_CHECKING:
    from runtime.engine_tensorrt import Device

NewEngine = Callable[[Component], Engine]


@dataclass(frozen=True)
class Backend:
    new_engine: NewEngine
    available_bytes: Callable[[], float]  # in the memory that holds its weights
    cache_sets: int = 1  # sets of VAE caches during a call: ONNX Runtime overwrites the old ones
    blocks: BlockBackend | None = None  # if components are in stages


def open_backend(bundle: Bundle, stack: ExitStack, options: BlockOptions) -> Backend:
    """The backend of ``bundle``; ``stack`` closes whatever its engines share.

    Raises:
        UserError: this version does not know the backend, it is not installed, or there is no matching GPU.
    """
    folder, build = bundle.folder, bundle.manifest.build
    if build is None or build.backend not in MODULES:
        found = build.backend if build else None
        raise UserError(f"{folder}: backend {found!r}", f"one of {', '.join(MODULES)}", "build it again")
    if build.backend == "onnxruntime":
        return _onnxruntime(bundle, options)
    if build.backend == "onnxruntime-gpu":
        from runtime.engine_cuda import CudaDevice

        gpu = stack.enter_context(CudaDevice.open(build.backend_version, build.compute_capability))
        return Backend(lambda component: gpu.engine(folder, component), gpu.available_bytes, cache_sets=2)
    from runtime.engine_tensorrt import Device

    device = stack.enter_context(Device.open(bundle.manifest))
    return tensorrt_backend(bundle, device, options)


def tensorrt_backend(bundle: Bundle, device: "Device", options: BlockOptions) -> Backend:
    """The engines of ``bundle`` on an open ``device``."""
    from runtime.blocks_tensorrt import GpuStages

    build = bundle.manifest.build
    profiles, from_disk = build.profiles if build else (), options.weights_in == "disk"

    def stages(experts: tuple[Component, ...], layout: BlockLayout) -> GpuStages:
        return GpuStages(device, experts, layout, bundle.folder, profiles, from_disk=from_disk)

    blocks = BlockBackend(bundle, options, stages, device.available_bytes)

    def new_engine(component: Component) -> Engine:
        whole = not component.in_blocks
        return device.engine(bundle.folder, component, profiles) if whole else blocks.engine(component, profiles)

    return Backend(new_engine, device.available_bytes, cache_sets=2, blocks=blocks if _has_blocks(bundle) else None)


def _onnxruntime(bundle: Bundle, options: BlockOptions) -> Backend:
    from runtime.blocks_onnxruntime import HostStages
    from runtime.engine_onnxruntime import OnnxRuntimeEngine

    def device(experts: tuple[Component, ...], layout: BlockLayout) -> HostStages:
        files = {expert.name: bundle.path(expert.weights[1]) for expert in experts}
        return HostStages(bundle.folder, experts[0].stages, layout, files)

    blocks = BlockBackend(bundle, options, device, available_host_bytes)
    profiles = bundle.manifest.build.profiles if bundle.manifest.build else ()

    def new_engine(component: Component) -> Engine:
        if component.in_blocks:
            return blocks.engine(component, ())
        return OnnxRuntimeEngine(bundle.folder, component, profiles)

    return Backend(new_engine, available_host_bytes, blocks=blocks if _has_blocks(bundle) else None)


def _has_blocks(bundle: Bundle) -> bool:
    return any(component.in_blocks for component in bundle.manifest.components)
