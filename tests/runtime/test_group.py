"""Threads as devices: what they exchange is right, and no failure leaves one waiting."""

import signal
import threading
from functools import partial

import numpy as np
import pytest

from runtime.group import Group, Link
from wan22.errors import UserError
from wan22.parallel import shares

NAMES = ("GPU 0", "GPU 1", "GPU 2")


@pytest.fixture
def group():
    with Group(NAMES, deadline_s=20) as made:
        yield made


def links(group):
    meeting = group.meeting((0, 1, 2))
    return [Link(meeting, rank, 3) for rank in range(3)]


def test_uneven_messages_arrive_where_they_belong(group):
    tokens, rows = 11, shares(11, 3)
    x = np.random.default_rng(0).random((tokens, 6, 5), np.float32)
    ends = links(group)

    def there_and_back(rank):
        own = np.ascontiguousarray(x[rows[rank]].reshape(-1, 3, 2, 5).transpose(1, 0, 2, 3))
        every, again = np.empty((tokens, 2, 5), np.float32), np.empty_like(own)
        ends[rank].all_to_all(list(own), [every[its] for its in rows])
        ends[rank].all_to_all([every[its] for its in rows], list(again))
        assert np.array_equal(own, again)
        return every

    found = group.run({rank: partial(there_and_back, rank) for rank in range(3)})
    for rank in range(3):
        assert np.array_equal(found[rank], x[:, 2 * rank : 2 * rank + 2])
    lengths = [its.stop - its.start for its in rows]
    assert lengths == [4, 4, 3]
    assert [end.sent_bytes for end in ends] == [4 * 10 * (2 * n + tokens - n) for n in lengths]


def test_the_other_collectives(group):
    ends = links(group)

    def talk(rank):
        end, part = ends[rank], np.full(2, rank, np.float32)
        gathered, told, sent = np.empty((3, 2), np.float32), part.copy(), part.copy()
        end.all_gather(part, list(gathered))
        end.broadcast(told, root=1)
        end.send(sent, source=0, target=2)
        return gathered[:, 0].tolist(), told[0], sent[0]

    found = group.run({rank: partial(talk, rank) for rank in range(3)})
    assert found == {rank: ([0, 1, 2], 1, 0 if rank == 2 else rank) for rank in range(3)}


def exchanging(ends, rank, then=lambda: None):
    array = np.zeros(3, np.float32)
    for _ in range(2):
        ends[rank].all_gather(array, [np.empty_like(array) for _ in range(3)])
        then()


def test_a_member_that_fails_ends_the_work_once_and_closes_the_group(group):
    ends, error = links(group), RuntimeError("CUDA error: an illegal memory access")

    def breaks():
        raise error

    work = {rank: partial(exchanging, ends, rank, breaks if rank == 1 else lambda: None) for rank in range(3)}
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        group.run(work)
    assert caught.value is error
    assert error.__notes__ == ["the group of GPU 0, GPU 1, GPU 2 is closed"]
    with pytest.raises(UserError, match=r"GPU 2 is closed: GPU 1 failed: RuntimeError.*illegal memory access"):
        group.run({0: lambda: None})


def test_bad_input_leaves_it_open(group):
    ends = links(group)

    def refuses():
        raise UserError("a video", "a smaller one", "use it")

    with pytest.raises(UserError, match="a smaller one"):
        group.run({rank: partial(exchanging, ends, rank, refuses if rank == 2 else lambda: None) for rank in range(3)})
    assert group.run({rank: partial(exchanging, ends, rank) for rank in range(3)}) == dict.fromkeys(range(3))


def test_nobody_waits_longer_than_the_deadline():
    with Group(NAMES[:2], deadline_s=0.2) as group:
        meeting, over = group.meeting((0, 1)), threading.Event()
        ends = [Link(meeting, rank, 2) for rank in range(2)]
        array = np.zeros(3, np.float32)
        with pytest.raises(UserError, match=r"GPU 0 has waited 0.2 s for GPU 1 \| expected devices that keep step"):
            group.run({0: lambda: ends[0].broadcast(array, root=1), 1: over.wait})
        with pytest.raises(UserError, match="is closed: GPU 1 did not answer"):
            group.run({0: lambda: None})
        over.set()
    with Group(NAMES[:2], deadline_s=0.2) as group:
        over.clear()
        with pytest.raises(UserError, match=r"GPU 1: no answer for 0.2 s after the others"):
            group.run({0: lambda: None, 1: over.wait})
        over.set()


def test_ctrl_c_in_a_collective_stops_all_of_them_and_they_go_on(group):
    ends, arrived = links(group), threading.Event()
    array = np.zeros(3, np.float32)

    def interrupts():
        assert arrived.wait(20)
        signal.raise_signal(signal.SIGINT)

    def waits(rank):
        arrived.set()
        ends[rank].broadcast(array.copy(), root=2)  # which 2 never makes

    with pytest.raises(KeyboardInterrupt):
        group.run({0: partial(waits, 0), 1: partial(waits, 1), 2: interrupts})
    assert not group.closed
    assert group.run({rank: partial(exchanging, ends, rank) for rank in range(3)}) == dict.fromkeys(range(3))
