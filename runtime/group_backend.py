"""The engines of a bundle on several devices (:mod:`wan22.parallel`), behind the interface of those on one."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from runtime.backend import AmongGpus, Backend, open_here
from runtime.block_backend import BlockOptions
from runtime.engine import Engine
from runtime.gpu import TO_RUN
from runtime.group import Group
from runtime.group_engine import EngineOnMembers, GroupExpert, GuidedExpert
from wan22.backends import require_module
from wan22.bundle import Bundle
from wan22.component import Component
from wan22.parallel import Devices
from wan22.strips import IN_STRIPS


class GroupBackend:
    """The backends of all members."""

    def __init__(self, bundle: Bundle, group: Group, devices: Devices, members: Sequence[Backend]) -> None:
        self._bundle, self._group, self._split, self._members = bundle, group, devices.split, members
        on_cpu = bundle.manifest.build is not None and bundle.manifest.build.backend == "onnxruntime"
        cores = len(os.sched_getaffinity(0))
        self._threads = max(1, cores // len(members)) if on_cpu else 0
        self._link_units()

    def _link_units(self) -> None:
        """Connect the members that divide tokens."""
        if self._split.ulysses == 1:
            return
        units = {unit for expert in range(self._split.experts) for unit in self._split.units(expert)}
        work = {}
        for unit in units:
            meeting = self._group.meeting(unit)
            for rank, member in enumerate(unit):
                work[member] = partial(self._members[member].link, meeting, rank, len(unit))
        self._group.run(work)

    def engine(self, component: Component) -> EngineOnMembers:
        """The engine of ``component`` on its members, not yet opened."""
        folder, split, experts = self._bundle.folder, self._split, self._bundle.manifest.spec.experts
        if component.name in experts:
            units = split.units(experts.index(component.name))
            kind = GuidedExpert if split.cfg > 1 else GroupExpert
            expert = kind(self._group, folder, component, units, self._threads)
            expert.alone = split.experts > 1
            return expert.on([member for unit in units for member in unit], self._new_engine)
        members, threads = [split.home], 0
        if split.vae > 1 and component.name.rpartition(".")[2] in IN_STRIPS:
            members, threads = list(range(split.vae)), self._threads
        return EngineOnMembers(self._group, folder, component, threads).on(members, self._new_engine)

    def _new_engine(self, member: int, component: Component) -> Engine:
        return self._members[member].new_engine(component)

    def spread(self, work: Sequence[Callable[[], None]]) -> None:
        """Do ``work`` on the members that take strips of the VAE's pictures, in turns."""
        count = self._split.vae

        def every(first: int) -> None:
            for each in work[first::count]:
                each()

        self._group.run({member: partial(every, member) for member in range(min(count, len(work)))})


def open_group(
    bundle: Bundle, stack: ExitStack, options: BlockOptions, devices: Devices, tell: Callable[[str], None]
) -> Backend:
    """The backend of ``bundle`` on ``devices``, each in a thread of its own; ``stack`` ends them.

    Raises:
        UserError: there are too few, or one cannot run the engines.
    """
    on_cpu = bundle.manifest.build is not None and bundle.manifest.build.backend == "onnxruntime"
    group = stack.enter_context(Group([f"{'device' if on_cpu else 'GPU'} {number}" for number in devices.numbers]))
    stacks = {member: ExitStack() for member in range(len(devices.numbers))}

    def close() -> None:
        if not group.closed:
            group.run({member: each.close for member, each in stacks.items()})

    stack.callback(close)
    copies, reaching = None, True
    if not on_cpu:
        from runtime.group_cuda import begin
        from runtime.host_copies import HostCopies

        reaching = begin(group, devices.numbers, tell)
        copies = HostCopies(require_module("cupy", "cupy-cuda13x", TO_RUN))

    def open_member(member: int) -> Backend:
        return open_here(bundle, stacks[member], options, AmongGpus(devices.numbers[member], reaching, copies))

    members = list(group.run({member: partial(open_member, member) for member in stacks}).values())
    of_group = GroupBackend(bundle, group, devices, members)
    blocks = [each.blocks for each in members if each.blocks is not None]

    def available_bytes() -> float:
        least = min(group.run({m: each.available_bytes for m, each in enumerate(members)}).values())
        return least / len(members) if on_cpu else least  # threads of a CPU share its memory

    return replace(
        members[0],
        new_engine=of_group.engine,
        available_bytes=available_bytes,
        blocks=blocks[0] if blocks else None,
        other_blocks=tuple(blocks[1:]),
        group=group,
        split=devices.split,
        spread=of_group.spread,
    )
