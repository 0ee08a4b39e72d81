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
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from wan22.block_memory import TURNING


class Transfers(Protocol):
    """The queues of a device."""

    def allocate(self, size_bytes: int) -> Any:
        """A slot: device memory for the weights of a block."""

    def copy(self, expert: str, block: int, slot: Any, after: Any) -> Any:
        """Enqueue the copy of a block into ``slot``, behind the event ``after`` if any; the event of its end."""

    def wait(self, event: Any) -> None:
        """Let all later computations wait for the event of a copy. Raises what the copy raised."""

    def computed(self) -> Any:
        """The event behind all computations enqueued so far."""


@dataclass
class Streamed:
    """What streams have copied."""

    blocks: int = 0
    size_bytes: int = 0
    seconds_waited: float = 0.0  # by the host, for blocks that were not read yet


class BlockStream:
    """The slots of one device, shared by the experts of a model."""

    def __init__(
        self, transfers: Transfers, blocks: int, slots: int, block_bytes: int, streamed: Streamed | None = None
    ) -> None:
        """Allocate the slots.

        Args:
            transfers: the device.
            blocks: blocks of a transformer.
            slots: at least :func:`wan22.block_memory.least_slots`; ``blocks`` or more keep all resident.
            block_bytes: weights of a block.
            streamed: adds up what this stream copies.
        """
        self._transfers, self._blocks, self._block_bytes = transfers, blocks, block_bytes
        count = min(slots, blocks)
        self.resident = blocks if count == blocks else count - TURNING
        self._slots = [transfers.allocate(block_bytes) for _ in range(count)]
        self._content: list[tuple[str, int] | None] = [None] * count
        self._filled: list[Any] = [None] * count
        self._used: list[Any] = [None] * count
        self.streamed = Streamed() if streamed is None else streamed

    def slot_of(self, block: int) -> int:
        if block < self.resident:
            return block
        return self.resident + (block - self.resident) % TURNING

    def begin(self, expert: str) -> None:
        """Before a forward of ``expert``: bring its first blocks unless they are there."""
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
        started = perf_counter()
        try:
            self._transfers.wait(self._filled[slot])
        except BaseException:
            self._content[slot] = None  # of unknown content
            raise
        self.streamed.seconds_waited += perf_counter() - started
        try:
            yield self._slots[slot]
        finally:
            self._used[slot] = self._transfers.computed()
        self._bring(slot, self._next(slot, expert, block, following))

    def _next(self, slot: int, expert: str, block: int, following: str) -> tuple[str, int]:
        """The block that is read from ``slot`` after ``block`` of ``expert``."""
        if slot >= self.resident and block + TURNING < self._blocks:
            return expert, block + TURNING
        return following, slot  # the first block in a slot has its number

    def _bring(self, slot: int, wanted: tuple[str, int]) -> None:
        if self._content[slot] != wanted:
            self._content[slot] = wanted
            self._filled[slot] = self._transfers.copy(*wanted, self._slots[slot], self._used[slot])
            self.streamed.blocks += 1
            self.streamed.size_bytes += self._block_bytes
