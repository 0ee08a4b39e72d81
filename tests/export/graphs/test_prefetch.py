"""The next item is computed while the previous one is in use, and its error reaches the consumer."""

import threading

import pytest

from export.graphs.weights_file import prefetch


def test_items_come_in_order():
    assert list(prefetch(range(100))) == list(range(100))
    assert list(prefetch([])) == []


def test_the_next_one_is_made_meanwhile():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    for item in prefetch(items()):
        assert item == 2 or second.wait(10)


def test_no_more_than_one_waits():
    made = []
    items = prefetch(made.append(index) or index for index in range(10))
    for _ in range(3):
        next(items)
    items.close()
    assert len(made) == 4


def test_a_fault_is_raised_where_the_item_is_wanted():
    def items():
        yield 1
        raise ValueError("torn")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="torn"):
        next(found)
