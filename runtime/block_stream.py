"""Keep the weights of some blocks in memory and stream those of the others, always one block ahead of the computation.

Every block has a fixed slot: the first blocks one of their own, in which they stay, all others take turns in the last
two. As soon as a block is computed, its slot receives what will be read from it next: a later block of this forward, or
a block of the forward that follows, which may be another expert's. So the second call of guidance, the next step and
the switch between experts find their first blocks in place.

A device has two queues, copies and computations, and events between them. A slot is filled only after the event of its
last use, and read only after the event of its copy; nothing ever waits for a whole queue.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from wan22.block_memory import TURNING


class Transfers(Protocol):
    """The queues of a device."""

    def allocate(self, size_bytes: int) -> Any:
        """A slot: device memory for the weights of a block."""

    def copy(self, expert: str, block: int, slot: Any, after: Any) -> Any:
        """Enqueue the copy of a block into ``slot``, behind the event ``after`` if any; the event of its end."""

    def refresh(self, expert: str, block: int, slot: Any, after: Any) -> Any:
        """As ``copy``, of what a LoRA may have replaced; the rest of the block is in ``slot``."""

    def wait(self, event: Any) -> None:
        """Let all later computations wait for the event of a copy. Raises what the copy raised."""

    def computed(self) -> Any:
        """The event behind all computations enqueued so far."""

    def seconds(self) -> tuple[float, float]:
        """Seconds that copies took, and that computations waited for them, since the last call.

        Copies under way count in a later call. All computations must be done.
        """


@dataclass(frozen=True)
class Streamed:
    """What streams have copied, and the time that it cost."""

    blocks: int = 0
    size_bytes: int = 0
    seconds_copied: float = 0.0  # from host memory or disk to a slot, beside the computation or not
    seconds_waited: float = 0.0  # by computations, for blocks that were not there yet
    seconds_waited_at_switches: float = 0.0  # the part of it in the first forward after a change of expert
    switches: int = 0  # changes of expert that the forward before knew of

    def __add__(self, other: "Streamed") -> "Streamed":
        return Streamed(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def since(self, before: "Streamed") -> "Streamed":
        return Streamed(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    @property
    def seconds_hidden(self) -> float:
        """The part of the copies during which something was computed."""
        return max(0.0, self.seconds_copied - self.seconds_waited)


NOTHING = Streamed()


class BlockStream:
    """The slots of one device, shared by the experts of a model."""

    def __init__(
        self, transfers: Transfers, blocks: int, slots: int, block_bytes: int, streamed: Streamed = NOTHING
    ) -> None:
        """Allocate the slots.

        Args:
            transfers: the device.
            blocks: blocks of a transformer.
            slots: at least :func:`wan22.block_memory.least_slots`; ``blocks`` or more keep all resident.
            block_bytes: weights of a block.
            streamed: what earlier streams of the device copied, to which this one adds.
        """
        self._transfers, self._blocks, self._block_bytes = transfers, blocks, block_bytes
        count = min(slots, blocks)
        self.resident = blocks if count == blocks else count - TURNING
        self._slots = [transfers.allocate(block_bytes) for _ in range(count)]
        self._content: list[tuple[str, int] | None] = [None] * count
        self._filled: list[Any] = [None] * count
        self._used: list[Any] = [None] * count
        self._stale: set[int] = set()  # slots whose block has changed in part
        self._announced = self._last = ""  # experts of forwards
        self._at_switch = False
        self.streamed = streamed

    def slot_of(self, block: int) -> int:
        if block < self.resident:
            return block
        return self.resident + (block - self.resident) % TURNING

    def changed(self, expert: str) -> None:
        """Parts of all blocks of ``expert`` have been replaced where they come from."""
        self._stale |= {slot for slot, content in enumerate(self._content) if content and content[0] == expert}

    def begin(self, expert: str) -> None:
        """Before a forward of ``expert``: bring its first blocks unless they are there."""
        self._at_switch = self._last != expert == self._announced
        for slot in range(len(self._slots)):
            self._bring(slot, (expert, slot))

    @contextmanager
    def block(self, expert: str, block: int, following: str) -> Iterator[Any]:
        """The slot that holds the weights of ``block``, to enqueue computations that read it.

        Args:
            expert: the expert of this forward.
            block: its block; blocks are asked for in order.
            following: the expert of the next forward.
        """
        slot = self.slot_of(block)
        self._bring(slot, (expert, block))
        try:
            self._transfers.wait(self._filled[slot])
        except BaseException:
            self._content[slot] = None  # of unknown content
            raise
        try:
            yield self._slots[slot]
        finally:
            self._used[slot] = self._transfers.computed()
        self._bring(slot, self._next(slot, expert, block, following))
        self._last, self._announced = expert, following

    def end(self) -> None:
        """After a forward, when its computations are done: account for its time."""
        copied, waited = self._transfers.seconds()
        at_switch = waited if self._at_switch else 0.0
        self.streamed += Streamed(0, 0, copied, waited, at_switch, int(self._at_switch))
        self._at_switch = False

    def _next(self, slot: int, expert: str, block: int, following: str) -> tuple[str, int]:
        """The block that is read from ``slot`` after ``block`` of ``expert``."""
        if slot >= self.resident and block + TURNING < self._blocks:
            return expert, block + TURNING
        return following, slot  # the first block in a slot has its number

    def _bring(self, slot: int, wanted: tuple[str, int]) -> None:
        if self._content[slot] != wanted:
            self._content[slot] = wanted
            self._filled[slot] = self._transfers.copy(*wanted, self._slots[slot], self._used[slot])
            self.streamed += Streamed(1, self._block_bytes)
        elif slot in self._stale:
            self._filled[slot] = self._transfers.refresh(*wanted, self._slots[slot], self._used[slot])
        self._stale.discard(slot)
