"""The search for a linearization, and the specification that it searches with, on histories by hand."""

import random
from itertools import permutations

import pytest

from tests.simulation.simulator import linearizability
from tests.simulation.simulator.history import Call, groups, step
from tests.simulation.simulator.linearizability import Undecided, unexplained
from tests.simulation.simulator.plan import Verb


def call(verb, invoked, returned, version=None, *, name="a", **more):
    return Call(client=0, verb=verb, name=name, version=version, invoked=invoked, returned=returned, **more)


def put(invoked, returned, version, **more):
    return call(Verb.PUT, invoked, returned, version, **more)


def get(invoked, returned, version, **more):
    if version is None:
        return call(Verb.GET, invoked, returned, refusal="not-found", **more)
    return call(Verb.GET, invoked, returned, version, **more)


def remove(invoked, returned, version, **more):
    return call(Verb.REMOVE, invoked, returned, version, **more)


def judge(*calls):
    names = tuple(sorted({name for one in calls for name in one.names}))
    return unexplained(calls, (None,) * len(names), lambda state, one: step(names, state, one))


GOOD = {
    "one after another": [put(1, 2, 7), get(3, 4, 7), remove(5, 6, 7), get(7, 8, None)],
    "a read beside a put sees either": [put(1, 4, 7), get(2, 3, None), put(5, 8, 8), get(6, 7, 8)],
    "two puts in either order": [put(1, 4, 7), put(2, 3, 8), get(5, 6, 7)],
    "one of two conditional puts": [
        put(1, 4, 7, absent=True),
        put(2, 3, 8, absent=True, refusal="conflict"),
        get(5, 6, 7),
    ],
    "an unknown put that took effect late": [put(1, None, 7), get(2, 3, None), get(4, 5, 7)],
    "an unknown put that never did": [put(1, None, 7), get(2, 3, None), get(4, 5, None)],
    "an unknown removal explains an empty name": [put(1, 2, 7), remove(3, None, None), get(4, 5, None)],
    "a move": [
        put(1, 2, 7),
        call(Verb.MOVE, 3, 4, 7, target="b"),
        get(5, 6, None),
        get(7, 8, 7, name="b"),
    ],
    "a copy keeps both": [
        put(1, 2, 7),
        call(Verb.COPY, 3, 4, 7, target="b"),
        get(5, 6, 7),
        get(7, 8, 7, name="b"),
    ],
    "a receipt that says it replaced": [put(1, 2, 7, replaced=False), put(3, 4, 8, replaced=True)],
    "a conditional put in its turn": [put(1, 2, 7), put(3, 4, 8, expected=7), get(5, 6, 8)],
}

BAD = {
    "a read that came after a put and did not see it": [put(1, 2, 7), get(3, 4, None)],
    "a removed version that comes back": [put(1, 2, 7), remove(3, 4, 7), get(5, 6, 7)],
    "two winners": [put(1, 4, 7, absent=True), put(2, 3, 8, absent=True)],
    "reads that disagree about the order": [
        put(1, 10, 7),
        put(2, 9, 8),
        get(11, 12, 7),
        get(13, 14, 8),
    ],
    "going back to an older version": [put(1, 2, 7), put(3, 10, 8), get(4, 5, 8), get(6, 7, 7)],
    "a conflict without reason": [put(1, 2, 7, absent=True, refusal="conflict")],
    "a version from nowhere": [get(1, 2, 9)],
    "a move that leaves its source": [
        put(1, 2, 7),
        call(Verb.MOVE, 3, 4, 7, target="b"),
        get(5, 6, 7),
    ],
    "an unknown put that would take effect twice": [
        put(1, None, 7),
        get(2, 3, 7),
        remove(4, 5, 7),
        get(6, 7, 7),
    ],
    "a receipt that denies what it replaced": [put(1, 2, 7), put(3, 4, 8, replaced=False)],
    "an unmet condition": [put(1, 2, 7), put(3, 4, 8, expected=6)],
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_a_linearizable_history_is_explained(history):
    assert judge(*history) is None


@pytest.mark.parametrize("history", BAD.values(), ids=BAD)
def test_a_history_that_no_order_explains_is_found(history):
    assert judge(*history) in history


def by_trying_all_orders(calls):
    """The definition: some of the unknown calls, and all others, in an order that time allows."""
    known = [one for one in calls if one.returned is not None]
    unknown = [one for one in calls if one.returned is None]
    for chosen in range(2 ** len(unknown)):
        some = known + [one for bit, one in enumerate(unknown) if chosen >> bit & 1]
        for order in permutations(some):
            in_time = all(
                earlier.invoked < (later.returned or 10**9)
                for place, earlier in enumerate(order)
                for later in order[place + 1 :]
            )
            state = (None,)
            for one in order if in_time else ():
                state = step(("a",), state, one)
                if state is None:
                    break
            if in_time and state is not None:
                return True
    return False


def test_the_search_agrees_with_trying_all_orders():
    draw = random.Random(1)
    verdicts = []
    for _ in range(400):
        moments = draw.sample(range(1, 30), 8)
        calls = []
        for number in range(4):
            invoked, returned = sorted(moments[2 * number : 2 * number + 2])
            version = draw.randint(1, 2)
            made = draw.choice(
                [
                    put(invoked, returned, number + 1, absent=draw.random() < 0.3),
                    put(invoked, None, number + 1),
                    get(invoked, returned, draw.choice([None, version])),
                    remove(invoked, returned, version),
                    remove(invoked, None, None),
                ]
            )
            calls.append(made)
        calls.sort(key=lambda one: one.invoked)
        verdicts.append(judge(*calls) is None)
        assert verdicts[-1] == by_trying_all_orders(calls), [str(one) for one in calls]
    assert 40 < sum(verdicts) < 360


def test_names_that_nothing_binds_are_searched_apart():
    calls = [
        put(1, 2, 1),
        put(3, 4, 2, name="b"),
        call(Verb.MOVE, 5, 6, 1, target="c"),
        put(7, 8, 3, name="d"),
    ]
    assert [(names, len(part)) for names, part in groups(calls)] == [
        (("a", "c"), 2),
        (("b",), 1),
        (("d",), 1),
    ]


def test_a_search_that_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr(linearizability, "MOST_STEPS", 50)
    with pytest.raises(Undecided):
        judge(*[put(number, 100 + number, number) for number in range(1, 20)], get(200, 201, 99))
