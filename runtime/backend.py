"""Open the engines of a bundle with the backend that it was built for, on one device or several."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from runtime.block_backend import BlockBackend, BlockOptions
from runtime.engine import Engine
from runtime.group import Group, Link, Meeting
from runtime.vae import Spread, in_turns
from wan22.backends import MODULES
from wan22.block_layout import BlockLayout
from wan22.bundle import Bundle
from wan22.component import Component
from wan22.errors import UserError
from wan22.memory import available_host_bytes
from wan22.parallel import ALONE, ONE_DEVICE, Devices, Split

if TYPE_CHECKING:
    from runtime.engine_tensorrt import Device
    from runtime.host_copies import HostCopies

log = logging.getLogger(__name__)

NewEngine = Callable[[Component], Engine]


@dataclass(frozen=True)
class AmongGpus:
    """One of the GPUs of this machine."""

    number: int = 0
    reaches_peers: bool = True  # the memory of the others of its group
    host_copies: "HostCopies | None" = None  # of weights, shared with the others


@dataclass(frozen=True)
class Backend:
    new_engine: NewEngine
    available_bytes: Callable[[], float]  # in the memory that holds its weights
    cache_sets: int = 1  # sets of VAE caches during a call: ONNX Runtime overwrites the old ones
    blocks: BlockBackend | None = None  # if components are in stages; those of the first device
    new_link: Callable[[Meeting, int, int], Link] = Link  # to other devices: a meeting, a rank and their number
    # of several devices
    group: Group | None = None
    split: Split = ALONE
    other_blocks: tuple[BlockBackend, ...] = ()
    spread: Spread = in_turns  # of the VAE's strips

    def link(self, meeting: Meeting, rank: int, size: int) -> None:
        """Divide the tokens with other devices, of which this one has ``rank``."""
        assert self.blocks is not None
        self.blocks.link = self.new_link(meeting, rank, size)

    @property
    def every_blocks(self) -> tuple[BlockBackend, ...]:
        return () if self.blocks is None else (self.blocks, *self.other_blocks)

    @property
    def links(self) -> list[Link]:
        """Those of devices that divide the tokens."""
        return [blocks.link for blocks in self.every_blocks if blocks.link is not None]


def open_backend(
    bundle: Bundle,
    stack: ExitStack,
    options: BlockOptions,
    devices: Devices = ONE_DEVICE,
    tell: Callable[[str], None] = log.info,
) -> Backend:
    """The backend of ``bundle`` on ``devices``; ``stack`` closes whatever its engines share.

    Raises:
        UserError: this version does not know the backend, it is not installed, or there is no matching GPU.
    """
    build = bundle.manifest.build
    if build is None or build.backend not in MODULES:
        found = build.backend if build else None
        raise UserError(f"{bundle.folder}: backend {found!r}", f"one of {', '.join(MODULES)}", "build it again")
    if devices.together:
        from runtime.group_backend import open_group

        return open_group(bundle, stack, options, devices, tell)
    if build.backend != "onnxruntime" and devices.numbers:
        from runtime.group_cuda import use_gpu

        use_gpu(devices.numbers[0], devices.numbers)
    return open_here(bundle, stack, options, AmongGpus(devices.numbers[0] if devices.numbers else 0))


def open_here(bundle: Bundle, stack: ExitStack, options: BlockOptions, gpu: AmongGpus = AmongGpus()) -> Backend:
    """The backend of ``bundle`` on the device of this thread; ``stack`` closes whatever its engines share."""
    folder, build = bundle.folder, bundle.manifest.build
    assert build is not None
    if build.backend == "onnxruntime":
        return _onnxruntime(bundle, options)
    if build.backend == "onnxruntime-gpu":
        from runtime.engine_cuda import CudaDevice

        cuda = stack.enter_context(CudaDevice.open(build.backend_version, build.compute_capability))
        cuda.number = gpu.number
        return Backend(lambda component: cuda.engine(folder, component), cuda.available_bytes, cache_sets=2)
    from runtime.engine_tensorrt import Device

    device = stack.enter_context(Device.open(bundle.manifest))
    device.number, device.reaches_peers = gpu.number, gpu.reaches_peers
    device.host_copies = gpu.host_copies or device.host_copies
    return tensorrt_backend(bundle, device, options)


def tensorrt_backend(bundle: Bundle, device: "Device", options: BlockOptions) -> Backend:
    """The engines of ``bundle`` on an open ``device``."""
    from runtime.blocks_tensorrt import GpuStages
    from runtime.group_cuda import link_of

    build = bundle.manifest.build
    profiles, from_disk = build.profiles if build else (), options.weights_in == "disk"

    def stages(experts: tuple[Component, ...], layout: BlockLayout) -> GpuStages:
        return GpuStages(device, experts, layout, bundle.folder, profiles, from_disk=from_disk)

    blocks = BlockBackend(bundle, options, stages, device.available_bytes)

    def new_engine(component: Component) -> Engine:
        whole = not component.in_blocks
        return device.engine(bundle.folder, component, profiles) if whole else blocks.engine(component, profiles)

    in_blocks = blocks if _has_blocks(bundle) else None
    return Backend(new_engine, device.available_bytes, 2, in_blocks, partial(link_of, device))


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
