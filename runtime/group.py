"""A group of devices: a thread for each, work that runs on several of them at once, and what they send each other.

Everything of a device happens in its thread. On a CPU a device is a thread with its own ONNX Runtime sessions, and what
members exchange is copied in the process's memory; :mod:`runtime.group_cuda` has the same links between GPUs.

No member waits for ever for another. If one fails, those that wait for it stop at once, its error ends the whole call,
and the group is closed: the device may be broken. After bad input or Ctrl-C all members have stopped in an orderly way,
and the group goes on. A member that does not answer within the deadline closes the group too.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from queue import SimpleQueue
from time import monotonic, perf_counter
from typing import Any, Self, TypeVar

from wan22.errors import NonFiniteError, UserError

T = TypeVar("T")
DEADLINE_S = 600.0  # for which a member waits for another one; they have the same work
AFTER_THESE_IT_GOES_ON = (UserError, NonFiniteError)


class StoppedError(Exception):
    """Raised in members that wait for one that has failed; the caller gets that one's error."""


class Meeting:
    """Where members of a group hand each other arrays: a place for each pair of sender and receiver."""

    def __init__(self, names: Sequence[str], deadline_s: float = DEADLINE_S) -> None:
        self._names, self._deadline_s = names, deadline_s
        self._changed = threading.Condition()
        self._offered: dict[tuple[int, int], Any] = {}
        self._taken: dict[tuple[int, int], Any] = {}
        self._stopped = False
        self.resumed = 0  # how often; what members remember from before may differ

    def offer(self, source: int, target: int, given: Any) -> None:
        with self._changed:
            self._offered[source, target] = given
            self._changed.notify_all()

    @contextmanager
    def taking(self, source: int, target: int) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        """What ``source`` offers, as soon as it does, and a function that leaves it an answer; then it may go on."""
        given = self._wait_for(self._offered, (source, target), target)
        answers: list[Any] = []
        yield given, answers.append
        with self._changed:
            self._taken[source, target] = answers[0] if answers else None
            self._changed.notify_all()

    def answer(self, source: int, target: int) -> Any:
        """Wait until ``target`` has taken what ``source`` offered; its answer."""
        return self._wait_for(self._taken, (source, target), source)

    def _wait_for(self, place: dict[tuple[int, int], Any], pair: tuple[int, int], waiting: int) -> Any:
        with self._changed:
            there = self._changed.wait_for(lambda: self._stopped or pair in place, self._deadline_s)
            if self._stopped:
                raise StoppedError
            if there:
                return place.pop(pair)
            self._stopped = True
            self._changed.notify_all()
        late = self._names[pair[0] if waiting == pair[1] else pair[1]]
        found = f"{self._names[waiting]} has waited {self._deadline_s:g} s for {late}"
        raise UserError(found, "devices that keep step", f"see what holds {late} up, then start again")

    def stop(self) -> None:
        """Let all who wait stop waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def resume(self) -> None:
        """Begin anew, when no member waits."""
        with self._changed:
            self._stopped, self.resumed = False, self.resumed + 1
            self._offered.clear()
            self._taken.clear()


class Link:
    """One member's end of the connections among ``size`` members, of which it is number ``rank``.

    All members make the same calls in the same order. Arrays are contiguous unless a call says otherwise, and those
    that it receives into must not be read before it returns; on a GPU this holds for later work of its stream.
    """

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, size
        self.sent_bytes, self.seconds = 0, 0.0  # to others, and in calls

    @property
    def resumed(self) -> int:
        """How often the members began anew after a call that did not end; what they keep from before may differ."""
        return self._meeting.resumed

    def all_to_all(self, sends: Sequence[Any], receives: Sequence[Any], pieces: int = 1) -> None:
        """Send every member its array of ``sends``, by rank, and receive from each into that of ``receives``.

        With several ``pieces``, arrays of ``sends`` may be contiguous along their first axis alone, which is so long.
        """
        self._exchange(dict(enumerate(sends)), dict(enumerate(receives)), pieces)

    def all_gather(self, part: Any, receives: Sequence[Any]) -> None:
        """Send ``part`` to all members, and receive theirs."""
        self._exchange(dict.fromkeys(range(self.size), part), dict(enumerate(receives)))

    def broadcast(self, array: Any, root: int) -> None:
        """Overwrite ``array`` with that of member ``root``."""
        if self.rank == root:
            self._exchange({peer: array for peer in range(self.size) if peer != root}, {})
        else:
            self._exchange({}, {root: array})

    def send(self, array: Any, source: int, target: int) -> None:
        """Overwrite ``array`` of member ``target`` with that of ``source``; nothing for all others."""
        self._exchange({target: array} if self.rank == source else {}, {source: array} if self.rank == target else {})

    def _exchange(self, sends: Mapping[int, Any], receives: Mapping[int, Any], pieces: int = 1) -> None:  # noqa: ARG002
        started = perf_counter()
        others = {peer: array for peer, array in sends.items() if peer != self.rank}
        for peer, array in others.items():
            self._meeting.offer(self.rank, peer, self._offered(array))
            self.sent_bytes += array.nbytes
        if self.rank in receives:
            self._copy(self._offered(sends[self.rank]), receives[self.rank])
        for peer in (peer for peer in receives if peer != self.rank):
            with self._meeting.taking(peer, self.rank) as (given, leave):
                leave(self._copy(given, receives[peer]))
        for peer in others:
            self._free_to_change(self._meeting.answer(self.rank, peer))
        self.seconds += perf_counter() - started

    def _offered(self, array: Any) -> Any:
        """What a receiver needs to copy ``array``."""
        return array

    def _copy(self, given: Any, target: Any) -> Any:
        """Copy what was offered; what its sender needs before it overwrites the array."""
        target[...] = given

    def _free_to_change(self, answer: Any) -> None:
        """An array that was sent may be overwritten from here on."""


class Member:
    """The thread of one device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)  # one may hang in a device
        self._thread.start()

    @property
    def is_here(self) -> bool:
        return threading.current_thread() is self._thread

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def end(self) -> None:
        self._work.put(None)

    def _serve(self) -> None:
        while (given := self._work.get()) is not None:
            future, work = given
            try:
                future.set_result(work())
            except BaseException as error:  # the caller gets it, whatever it is
                future.set_exception(error)
            del given, future, work  # they hold arrays


class Group:
    """Members called ``names``; a context manager that ends their threads."""

    def __init__(self, names: Sequence[str], deadline_s: float = DEADLINE_S) -> None:
        self.names, self._deadline_s = tuple(names), deadline_s
        self._members = [Member(name) for name in names]
        self._meetings: dict[tuple[int, ...], Meeting] = {}
        self.closed = ""  # the reason, if it is

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.end()

    def meeting(self, members: tuple[int, ...]) -> Meeting:
        """The meeting of ``members``."""
        if members not in self._meetings:
            self._meetings[members] = Meeting([self.names[member] for member in members], self._deadline_s)
        return self._meetings[members]

    @property
    def here(self) -> int | None:
        """The member in whose thread this is called."""
        return next((number for number, member in enumerate(self._members) if member.is_here), None)

    def call(self, member: int, work: Callable[[], T]) -> T:
        """Do ``work`` in the thread of ``member``, which may be this one."""
        return work() if self._members[member].is_here else self.run({member: work})[member]

    def run(self, work: Mapping[int, Callable[[], T]]) -> dict[int, T]:
        """Do ``work`` of several members at once; their results.

        Raises:
            UserError: the group is closed, or a member does not answer.
            Exception: the error of the member that failed first.
        """
        self._check_open()
        futures = {member: self._members[member].submit(each) for member, each in work.items()}
        try:
            failed = self._first_failure(futures)
        except BaseException:  # Ctrl-C
            self._stop(futures)
            raise
        if failed is not None:
            error = self._stop(futures) or failed
            if not isinstance(error, AFTER_THESE_IT_GOES_ON):
                self._close(f"{self._culprit(futures, error)} failed: {error!r}")
                error.add_note(f"the group of {', '.join(self.names)} is closed")
            raise error
        return {member: future.result() for member, future in futures.items()}

    def _first_failure(self, futures: "Mapping[int, Future[Any]]") -> BaseException | None:
        """Wait until all are done; the error of the first that failed, as soon as it has.

        The last has the deadline behind the first.
        """
        pending, until = set(futures.values()), None
        while pending:
            left = None if until is None else max(0.0, until - monotonic())
            done, pending = wait(pending, left, FIRST_COMPLETED)
            if failed := next((future for future in done if future.exception() is not None), None):
                return failed.exception()
            if not done:
                late = ", ".join(self.names[member] for member, future in futures.items() if future in pending)
                found = f"{late}: no answer for {self._deadline_s:g} s after the others"
                return UserError(found, "devices that keep step", f"see what holds {late} up, then start again")
            until = until or monotonic() + self._deadline_s
        return None

    def _stop(self, futures: "Mapping[int, Future[Any]]") -> BaseException | None:
        """Let all members of ``futures`` come to an end; the error that is not a consequence of another one's."""
        touched = [meeting for members, meeting in self._meetings.items() if set(members) & futures.keys()]
        for meeting in touched:
            meeting.stop()
        until = monotonic() + self._deadline_s
        while (waiting := [future for future in futures.values() if not future.done()]) and monotonic() < until:
            try:
                wait(waiting, until - monotonic())
            except KeyboardInterrupt:  # however often it is pressed
                continue
        if waiting:
            late = ", ".join(self.names[member] for member, future in futures.items() if not future.done())
            self._close(f"{late} did not answer")
        else:
            for meeting in touched:
                meeting.resume()
        errors = [future.exception() for future in futures.values() if future.done()]
        return next((error for error in errors if error and not isinstance(error, StoppedError)), None)

    def _culprit(self, futures: "Mapping[int, Future[Any]]", error: BaseException) -> str:
        found = (member for member, future in futures.items() if future.done() and future.exception() is error)
        return ", ".join(self.names[member] for member in found)

    def _close(self, why: str) -> None:
        self.closed = self.closed or why

    def _check_open(self) -> None:
        if self.closed:
            found = f"the group of {', '.join(self.names)} is closed: {self.closed}"
            raise UserError(found, "a group whose devices all work", "start again, without that device if it is broken")
