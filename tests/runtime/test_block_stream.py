"""No slot is overwritten while it is read or read before its copy ended, in any order in which two queues can run."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.block_stream import BlockStream


@dataclass
class Queues:
    """A device whose queues only record. An operation begins once its event happened; it takes time until it ends."""

    copies: list = field(default_factory=list)  # (slot, content, event that it waits for)
    reads: list = field(default_factory=list)  # (slot, content, copy that it waits for)
    slots: int = 0
    waits_for: int | None = None

    def allocate(self, _size_bytes):
        self.slots += 1
        return self.slots - 1

    def copy(self, expert, block, slot, after):
        self.copies.append((slot, (expert, block), after))
        return len(self.copies)  # the event: so many copies are done

    def wait(self, event):
        self.waits_for = max(self.waits_for or 0, event)

    def computed(self):
        return len(self.reads)  # the event: so many reads are done

    def seconds(self):
        return 0.0, 0.0

    def read(self, slot, content):
        self.reads.append((slot, content, self.waits_for))

    def check_every_order(self):
        """Walk through all states: copies and reads done, and which of both are running."""
        seen, todo = set(), [(0, False, 0, False)]
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            copied, copying, read, reading = state
            following = []
            if copying:
                following.append((copied + 1, False, read, reading))
            elif copied < len(self.copies) and (self.copies[copied][2] or 0) <= read:
                following.append((copied, True, read, reading))
            if reading:
                following.append((copied, copying, read + 1, False))
            elif read < len(self.reads) and (self.reads[read][2] or 0) <= copied:
                following.append((copied, copying, read, True))
            if reading:
                self.check_read(copied, copying, read)
            assert following or state == (len(self.copies), False, len(self.reads), False), "stuck"
            todo += following

    def check_read(self, copied, copying, read):
        slot, wanted, _ = self.reads[read]
        assert not (copying and self.copies[copied][0] == slot), f"{wanted} is overwritten while it is read"
        inside = [content for where, content, _ in self.copies[:copied] if where == slot]
        assert inside and inside[-1] == wanted, f"{wanted} is read from a slot with {inside[-1:]}"


def run(blocks, slots, forwards):
    """Forwards: (expert, announced follower, block at which it breaks off or None)."""
    queues = Queues()
    stream = BlockStream(queues, blocks, slots, 100)
    for expert, following, breaks_at in forwards:
        stream.begin(expert)
        for block in range(blocks):
            if block == breaks_at:
                break
            with stream.block(expert, block, following) as slot:
                queues.read(slot, (expert, block))  # qkv
                queues.read(slot, (expert, block))  # rest
    return queues, stream


EXPERTS = ("high", "low")
PLANS = [
    [(expert, following, None) for expert, following in zip(experts, followers, strict=True)]
    for experts in itertools.product(EXPERTS, repeat=3)
    for followers in itertools.product(EXPERTS, repeat=3)
]


@pytest.mark.parametrize("slots", [2, 3])
def test_three_blocks_in_every_order(slots):
    for forwards in PLANS:
        run(3, slots, forwards)[0].check_every_order()


forwards = st.lists(st.tuples(*[st.sampled_from(EXPERTS)] * 2, st.none() | st.integers(0, 8)), max_size=5)


@given(blocks=st.integers(1, 9), slots=st.integers(2, 10), forwards=forwards)
@settings(max_examples=150, deadline=None)
def test_any_number_of_blocks_slots_and_forwards_even_broken_off(blocks, slots, forwards):
    queues, _ = run(blocks, max(min(2, blocks), slots), forwards)
    queues.check_every_order()


def test_resident_blocks_are_copied_once_and_the_others_once_a_forward():
    steps = [("high", "high", None)] * 4
    queues, stream = run(10, 6, steps)
    counts = {block: sum(content == ("high", block) for _, content, _ in queues.copies) for block in range(10)}
    assert stream.resident == 4
    assert [counts[block] for block in range(4)] == [1] * 4
    assert [counts[block] for block in range(4, 6)] == [5, 5]  # the last forward brings them for another
    assert [counts[block] for block in range(6, 10)] == [4] * 4
    assert stream.streamed.size_bytes == 100 * len(queues.copies)


def test_the_last_forward_of_an_expert_brings_the_first_blocks_of_the_other():
    queues, stream = run(6, 4, [("high", "high", None), ("high", "low", None)])
    brought = [content for _, content, _ in queues.copies if content[0] == "low"]
    assert brought == [("low", 0), ("low", 1), ("low", 2), ("low", 3)]
    before = len(queues.copies)
    stream.begin("low")
    assert len(queues.copies) == before


def test_a_copy_that_fails_is_made_again():
    class Failing(Queues):
        def wait(self, event):
            if len(self.copies) == 2:
                raise OSError("disk")
            super().wait(event)

    queues = Failing()
    stream = BlockStream(queues, 4, 2, 100)
    stream.begin("high")
    with pytest.raises(OSError, match="disk"), stream.block("high", 0, "high"):
        pass
    stream.begin("high")
    assert [content for _, content, _ in queues.copies] == [("high", 0), ("high", 1), ("high", 0)]
