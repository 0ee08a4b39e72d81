"""Links between the GPUs of one process: copies between peers, or NCCL where they do not reach each other's memory.

The threads of the members meet on the host for every exchange; their streams do not wait for the host. A copy is
enqueued behind the event of what it reads, and the reader's event lets the sender overwrite it. So a member that fails
leaves no GPU waiting: nobody enqueues what depends on work that was not enqueued.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.gpu import TO_RUN
from runtime.group import Group, Link, Meeting
from wan22.backends import require_module
from wan22.errors import UserError

if TYPE_CHECKING:
    from runtime.engine_tensorrt import Device

NCCL = (".cuda.nccl", "cupy")  # which CuPy does not import by itself


class PeerLink(Link):
    """Copies between GPUs of which each reads the other's memory, or by the driver through the host's."""

    def __init__(self, meeting: Meeting, rank: int, size: int, device: "Device") -> None:
        super().__init__(meeting, rank, size)
        self._cupy, self._stream, self._number = device.cupy, device.stream, device.number
        self._reaches_peers = device.reaches_peers

    def _offered(self, array: Any) -> tuple[Any, Any, int]:
        return array, self._record(), self._number

    def _copy(self, given: tuple[Any, Any, int], target: Any) -> Any:
        array, ready, source = given
        if source != self._number:
            self._stream.wait_event(ready)
        if array.flags.c_contiguous:
            self._copy_piece(array, source, target)
        elif source == self._number or self._reaches_peers:
            runtime, size = self._cupy.cuda.runtime, array[0].nbytes
            of_target, of_source = (int(target.data.ptr), size), (int(array.data.ptr), array.strides[0])
            runtime.memcpy2DAsync(*of_target, *of_source, size, len(array), runtime.memcpyDefault, self._stream.ptr)
        else:
            for piece, its_target in zip(array, target, strict=True):
                self._copy_piece(piece, source, its_target)
        return self._record()

    def _copy_piece(self, array: Any, source: int, target: Any) -> None:
        here = (int(target.data.ptr), self._number)
        self._cupy.cuda.runtime.memcpyPeerAsync(*here, int(array.data.ptr), source, array.nbytes, self._stream.ptr)

    def _free_to_change(self, answer: Any) -> None:
        self._stream.wait_event(answer)

    def _record(self) -> Any:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return event


class NcclLink(PeerLink):
    """Grouped sends and receives of NCCL, which moves data through host memory in pieces."""

    def __init__(self, meeting: Meeting, rank: int, size: int, device: "Device") -> None:
        super().__init__(meeting, rank, size, device)
        self._nccl: Any = import_module(*NCCL)
        self._communicator: Any = None

    def _exchange(self, sends: Mapping[int, Any], receives: Mapping[int, Any], pieces: int = 1) -> None:
        if self._communicator is None:
            self._join()
        own, peers = sends.get(self.rank), sorted({*sends, *receives} - {self.rank})
        if own is not None and self.rank in receives:
            self._copy((own, None, self._number), receives[self.rank])
        self._meet(peers)
        self._nccl.groupStart()
        for peer in peers:
            if peer in sends:
                self.sent_bytes += sends[peer].nbytes
                for message in self._messages(sends[peer], pieces):
                    self._communicator.send(*message, peer, self._stream.ptr)
            if peer in receives:
                for message in self._messages(receives[peer], pieces):
                    self._communicator.recv(*message, peer, self._stream.ptr)
        self._nccl.groupEnd()

    def _messages(self, array: Any, pieces: int) -> list[tuple[int, int, int]]:
        parts = [array] if pieces == 1 else list(array)
        return [(int(part.data.ptr), part.nbytes, self._nccl.NCCL_UINT8) for part in parts]

    def _join(self) -> None:
        """Make the communicator, which all members do at once."""
        peers = [peer for peer in range(self.size) if peer != self.rank]
        if self.rank == 0:
            identity = self._nccl.get_unique_id()
            for peer in peers:
                self._meeting.offer(0, peer, identity)
            for peer in peers:
                self._meeting.answer(0, peer)
        else:
            with self._meeting.taking(0, self.rank) as (identity, _):
                pass
        self._communicator = self._nccl.NcclCommunicator(self.size, identity, self.rank)

    def _meet(self, peers: Sequence[int]) -> None:
        """Wait until all ``peers`` are here, so that no GPU begins to wait for one whose thread has failed."""
        for peer in peers:
            self._meeting.offer(self.rank, peer, None)
        for peer in peers:
            with self._meeting.taking(peer, self.rank):
                pass
        for peer in peers:
            self._meeting.answer(self.rank, peer)


def link_of(device: "Device", meeting: Meeting, rank: int, size: int) -> Link:
    """The link of a member on ``device``."""
    kind = PeerLink if device.reaches_peers or not import_module(*NCCL).available else NcclLink
    return kind(meeting, rank, size, device)


def use_gpu(number: int, numbers: Sequence[int]) -> list[int]:
    """Let this thread use GPU ``number``; those of ``numbers`` whose memory it cannot reach.

    Raises:
        UserError: the machine has fewer.
    """
    cupy = require_module("cupy", "cupy-cuda13x", TO_RUN)
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UserError(f"no usable GPU ({error})", "GPUs for --gpus", "check nvidia-smi") from None
    if max(numbers) >= count:
        found = f"--gpus {','.join(map(str, numbers))} on a machine with {count}"
        raise UserError(found, f"numbers from 0 to {count - 1}", "name others, or use fewer")
    cupy.cuda.Device(number).use()
    others = [other for other in numbers if other != number]
    beyond = [other for other in others if not cupy.cuda.runtime.deviceCanAccessPeer(number, other)]
    for other in set(others) - set(beyond):
        try:
            cupy.cuda.runtime.deviceEnablePeerAccess(other)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if "PeerAccessAlreadyEnabled" not in str(error):
                raise
    return beyond


def begin(group: Group, numbers: Sequence[int], tell: Callable[[str], None]) -> bool:
    """Let every member of ``group`` use its GPU; True if all reach each other's memory, else it is told."""
    found = group.run({member: partial(use_gpu, number, numbers) for member, number in enumerate(numbers)})
    beyond = [f"{numbers[member]} and {other}" for member, others in found.items() for other in others]
    if beyond:
        tell(f"GPUs {beyond[0]} do not reach each other's memory: what they exchange goes through host memory")
    return not beyond
