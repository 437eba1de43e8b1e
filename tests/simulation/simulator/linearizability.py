"""Is a history linearizable? The search of Wing and Gong with the memory of Lowe.

J. M. Wing, C. Gong, "Testing and verifying concurrent objects" (1993); G. Lowe, "Testing for
linearizability" (2017): go through the history depth first, let one pending call after another take effect,
go back where an answer comes that nothing explains, and never visit the same set of calls with the same
state twice.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.simulation.simulator.history import Call

S = TypeVar("S", bound=Hashable)

MOST_STEPS = 400_000
"""After so many steps the search gives up, and says so."""


class Undecided(Exception):
    """The search was given up: too many calls with unknown outcomes overlap."""


@dataclass(slots=True, eq=False)
class _Event:
    """An invocation or an answer, in a list from which pairs are taken out and put back."""

    call: int
    is_answer: bool
    previous: "_Event | None" = None
    following: "_Event | None" = None


class _Search(Generic[S]):
    def __init__(self, calls: Sequence[Call], initial: S, step: Callable[[S, Call], S | None]) -> None:
        self._calls = calls
        self._state = initial
        self._step = step
        self._head = _Event(-1, is_answer=False)
        self._answers: dict[int, _Event] = {}
        moments = [(call.invoked, number, False) for number, call in enumerate(calls)]
        moments += [(call.returned, number, True) for number, call in enumerate(calls) if call.returned]
        last = self._head
        for _, number, is_answer in sorted(moments):
            event = _Event(number, is_answer, previous=last)
            last.following = event
            last = event
            if is_answer:
                self._answers[number] = event
        self._missing = len(self._answers)
        self.furthest = -1
        """The answer that no order could explain, of the attempt that came furthest."""
        self._most_explained = -1

    def run(self) -> bool:
        seen: set[tuple[int, S]] = set()
        done = 0
        stack: list[tuple[_Event, S]] = []
        event = self._head.following
        steps = 0
        while self._missing:
            steps += 1
            if steps > MOST_STEPS:
                raise Undecided(f"{steps} steps over {len(self._calls)} calls")
            if event is not None and not event.is_answer:
                following = self._step(self._state, self._calls[event.call])
                after = done | 1 << event.call
                if following is not None and (after, following) not in seen:
                    seen.add((after, following))
                    stack.append((event, self._state))
                    done, self._state = after, following
                    self._take_out(event)
                    event = self._head.following
                else:
                    event = event.following
                continue
            # An answer comes (or the end) and its call has not taken effect: this order explains no more.
            if event is not None and len(stack) > self._most_explained:
                self._most_explained, self.furthest = len(stack), event.call
            if not stack:
                return False
            event, self._state = stack.pop()
            done &= ~(1 << event.call)
            self._put_back(event)
            event = event.following
        return True

    def _take_out(self, event: _Event) -> None:
        answer = self._answers.get(event.call)
        for one in (event, answer):
            if one is not None:
                one.previous.following = one.following
                if one.following is not None:
                    one.following.previous = one.previous
        self._missing -= answer is not None

    def _put_back(self, event: _Event) -> None:
        answer = self._answers.get(event.call)
        for one in (answer, event):
            if one is not None:
                one.previous.following = one
                if one.following is not None:
                    one.following.previous = one
        self._missing += answer is not None


def unexplained(calls: Sequence[Call], initial: S, step: Callable[[S, Call], S | None]) -> Call | None:
    """Return None if the calls are linearizable, else an answer that no order of them explains.

    `step` gives the state after a call, or None when it cannot be answered so in a state. Raise Undecided
    when the search takes too long.
    """
    search = _Search(calls, initial, step)
    if search.run():
        return None
    return calls[search.furthest]
