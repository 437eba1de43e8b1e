"""Draw a plan from a seed. What is drawn together here fits together; what it does is told elsewhere."""

import random
from dataclasses import replace

from tests.simulation.simulator.cluster import APPS, CONTROLLERS
from tests.simulation.simulator.plan import Fault, Operation, Plan, Round, Shape, Verb, When
from tests.simulation.simulator.scale import EXTENT_CHUNKS, SMALL_SIZE

_VERBS = {
    Verb.PUT: 34,
    Verb.GET: 20,
    Verb.GET_RANGE: 8,
    Verb.STAT: 6,
    Verb.LIST: 5,
    Verb.REMOVE: 12,
    Verb.MOVE: 8,
    Verb.COPY: 7,
}
_CONDITIONS = {When.ABSENT: 4, When.SEEN: 3, When.ANYTHING: 3}
_LAYOUTS = ("", "", "", "", "2+1", "1+2", "2+2", "3+2", "1+1")

_POOL_FAULTS = {
    "kill": 10,
    "pause": 6,
    "slow-network": 4,
    "slow-disk": 6,
    "full-disk": 3,
    "failing-flush": 3,
    "unreadable-pieces": 3,
    "bit-flip": 12,
    "power-loss": 6,
    "swap-disks": 2,
    "roll-back": 4,
    "lose-disk": 1,
    "replace-pool": 2,
    "drain-pool": 3,
    "clone": 1,
    "wrong-clock": 2,
}
_APP_FAULTS = {"kill": 4, "pause": 2, "slow-network": 2, "wrong-clock": 1}
_CONTROLLER_FAULTS = {
    "kill": 5,
    "pause": 2,
    "takeover": 3,
    "slow-network": 1,
    "slow-disk": 3,
    "failing-flush": 2,
    "wrong-clock": 1,
}
_LINK_FAULTS = {"partition": 5, "break-connections": 5}

_EXCLUSIVE = {"clone", "swap-disks", "roll-back", "drain-pool"}
"""No other fault of the same pools in a round with one of these, for what they do to a disk says who it is;
and none of the controller's beside a clone but its death: a master that cannot be heard cannot know a copy from
a pool that lives."""


_LONG_PUTS = 0.12
"""In so many plans a put lasts so long that a pool is out before it ends."""

_MOVES = 0.08
"""In so many plans shards are moved away from a disk that fails."""

_READS_OF_DAMAGE = 0.06
"""In so many plans files are read before anybody has noticed that they are damaged."""


_SEVERAL_CONTROLLERS = 0.25
"""In so many plans there are three controllers, which share a store."""

_COPIES = 0.25
"""In so many of the others each of three controllers has a copy."""

_RELAYOUTS = 0.25
"""In so many plans files are given another layout."""

_RESUMED = 0.25
"""In so many plans puts break off and are gone on with."""

_TAKEOVERS = 0.06
"""In so many plans with one controller another takes its place, and an app does not hear of it."""

_GROWING = 0.25
"""In so many plans that are about nothing else some pools join when there are files already."""

_FULL_CATALOGUES = 0.2
"""In so many plans the disks of controllers are full for a while."""

_LATE_VERDICTS = 0.08
"""In so many plans a pool is told that its damaged shards are dead after it has rebuilt them."""


def _pick(draw: random.Random, weights: dict) -> object:
    return draw.choices(list(weights), list(weights.values()))[0]


def draw_plan(seed: int) -> Plan:
    """Return the plan of a seed."""
    draw = random.Random(f"plan {seed}")
    shape = _draw_shape(draw)
    folder = [f"docs/{letter}" for letter in "abcdef"[: draw.choice((2, 3, 4, 6))]]
    rounds = []
    sizes: set[int] = set()
    numbers = iter(range(1, 100_000))
    for _ in range(draw.choice((1, 1, 2))):
        most_s = draw.uniform(4, 20)
        operations = _draw_operations(draw, shape, folder, most_s, sizes, numbers)
        faults = _draw_faults(draw, shape, most_s, numbers)
        rounds.append(Round(operations=operations, faults=faults, most_s=most_s))
    if draw.random() < _LONG_PUTS:
        shape = replace(shape, replace_after_s=6.0)
        rounds[0] = _with_long_put(draw, shape, rounds[0], sizes, numbers)
    elif draw.random() < _MOVES:
        shape = replace(shape, review_s=1.5, scrub_every_s=5.0)
        rounds[0] = _with_moves(draw, shape, rounds[0], sizes, numbers)
    elif draw.random() < _READS_OF_DAMAGE:
        shape = replace(shape, scrub_every_s=40.0)
        rounds[0] = _with_reads_of_damage(draw, shape, rounds[0], sizes, numbers)
    elif draw.random() < _LATE_VERDICTS:
        shape = replace(shape, heartbeat_s=1.0, down_after_s=3.0, replace_after_s=6.0)
        rounds[0] = _with_late_verdicts(draw, shape, sizes, numbers)
    elif len(shape.pools) > 4 and (others := random.Random(f"growing {seed}")).random() < _GROWING:
        shape = replace(shape, later=others.randint(1, len(shape.pools) - 3))
        rounds[-1] = _with_pools_that_join(others, shape, rounds[-1], numbers)
    if (others := random.Random(f"controllers {seed}")).random() < _SEVERAL_CONTROLLERS:
        shape = replace(shape, controllers=3, lease_s=others.choice((3.0, 6.0)))
        rounds[0] = _with_failovers(others, rounds[0], numbers)
    elif (others := random.Random(f"copies {seed}")).random() < _COPIES:
        shape = replace(shape, controllers=3, copies=True, journal=others.choice((0, 0, 1)))
        rounds[0] = _with_promotions(others, rounds[0], numbers)
    elif (others := random.Random(f"takeovers {seed}")).random() < _TAKEOVERS:
        rounds[0] = _with_takeover(others, rounds[0], numbers)
    if (others := random.Random(f"relayouts {seed}")).random() < _RELAYOUTS:
        rounds = [_with_relayouts(others, part, numbers) for part in rounds]
    if (others := random.Random(f"resumed {seed}")).random() < _RESUMED:
        rounds = [_with_resumed_puts(others, shape, part, sizes, numbers) for part in rounds]
    if (others := random.Random(f"full catalogues {seed}")).random() < _FULL_CATALOGUES:
        rounds = [_with_full_catalogues(others, shape, part, numbers) for part in rounds]
    return Plan(seed=seed, shape=shape, rounds=tuple(rounds))


def _with_pools_that_join(draw: random.Random, shape: Shape, part: Round, numbers) -> Round:
    """Return the round with pools that join, each at a moment of its own or all at once."""
    at_s = draw.uniform(0.5, part.most_s * 0.7)
    faults = [
        Fault(
            number=next(numbers),
            kind="add-pool",
            at_s=draw.choice((at_s, draw.uniform(0.5, part.most_s * 0.7))),
            for_s=0.1,
            one=pool,
        )
        for pool in shape.pools[len(shape.pools) - shape.later :]
    ]
    ordered = sorted((*part.faults, *faults), key=lambda fault: (fault.at_s, fault.number))
    return replace(part, faults=tuple(ordered))


def _with_full_catalogues(draw: random.Random, shape: Shape, part: Round, numbers) -> Round:
    """Return the round with controllers whose disks are full."""
    faults = [
        Fault(
            number=next(numbers),
            kind="full-catalogue",
            at_s=draw.uniform(0, part.most_s * 0.8),
            for_s=draw.choice((draw.uniform(0.01, 2.0), draw.uniform(2.0, 12.0))),
            one=draw.choice(list(CONTROLLERS)[: shape.controllers]),
            amount=draw.random(),
        )
        for _ in range(draw.choice((1, 2, 4)))
    ]
    ordered = sorted((*part.faults, *faults), key=lambda fault: (fault.at_s, fault.number))
    return replace(part, faults=tuple(ordered))


def _with_resumed_puts(draw: random.Random, shape: Shape, part: Round, sizes: set[int], numbers) -> Round:
    """Return the round with puts of several extents that break off and are gone on with."""
    operations = list(part.operations)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(operations))
        put = Operation(
            number=next(numbers),
            client=operations[place].client,
            verb=Verb.PUT,
            name=operations[place].name,
            size=max(_draw_size(draw, shape, sizes) for _ in range(6)),
            layout=draw.choice(_LAYOUTS),
            when=draw.choice((When.ANYTHING, When.ANYTHING, When.ABSENT)),
            patience_s=draw.choice((5.0, 30.0, 30.0)),
            dawdle_s=draw.choice((0.0, 0.02, 0.2)),
            breaks=tuple(draw.random() for _ in range(draw.choice((1, 1, 2)))),
        )
        operations.insert(place + 1, put)
    return replace(part, operations=tuple(operations))


def _with_relayouts(draw: random.Random, part: Round, numbers) -> Round:
    """Return the round with files that are given another layout between the other operations."""
    operations = list(part.operations)
    for _ in range(draw.randint(2, 8)):
        place = draw.randrange(len(operations))
        beside = operations[place]
        relayout = Operation(
            number=next(numbers),
            client=draw.choice((beside.client, 0)),
            verb=Verb.RELAYOUT,
            name=beside.name,
            layout=draw.choice(_LAYOUTS),
            pause_s=draw.choice((0.0, 0.01, 0.5)),
            patience_s=draw.choice((0.1, 20.0, 20.0)),
            dawdle_s=draw.choice((0.0, 0.0, 0.05)),
        )
        operations.insert(place + 1, relayout)
    return replace(part, operations=tuple(operations))


def _with_promotions(draw: random.Random, part: Round, numbers) -> Round:
    """Return the round with faults of controllers that have copies, and operators that promote another."""
    master, one, other = CONTROLLERS
    at_s = draw.uniform(1, 4)
    for_s = draw.uniform(2, 6)
    end_s = at_s + for_s
    kind = draw.choice(("any", "any", "lacks-much", "is-alone", "beside"))
    if kind == "lacks-much":  # Who is promoted lacks what the others have, and the master is gone.
        faults = [
            _of("partition", at_s, for_s, master, other=one),
            _of("kill", end_s - 0.3, 12.0, master),
            _of("promote", end_s + 0.3, 0.1, one),
        ]
    elif kind == "is-alone":  # So it does, and nobody can be reached.
        faults = [
            _of("kill", at_s, for_s, one),
            _of("pause", end_s - 0.3, 22.0, master),
            _of("pause", end_s - 0.3, 13.0, other),
            _of("promote", end_s + 4.5, 0.1, one),
        ]
    elif kind == "beside":  # The master works on, and does not hear of it.
        faults = [
            _of("partition", at_s, 12.0, master, other=one),
            _of("promote", at_s + draw.uniform(0.1, 3), 0.1, one),
        ]
    else:
        faults = [
            _draw_fault_of_copies(draw, max(part.most_s, 15.0)) for _ in range(draw.choice((1, 2, 3, 4)))
        ]
    faults = [replace(fault, number=next(numbers)) for fault in faults]
    faults = [fault for fault in faults if not any(_clash(fault, other) for other in part.faults)]
    ordered = sorted((*part.faults, *faults), key=lambda fault: (fault.at_s, fault.number))
    return replace(part, faults=tuple(ordered), most_s=max(part.most_s, 30.0))


def _with_takeover(draw: random.Random, part: Round, numbers) -> Round:
    """Return the round with a second master, whom an app cannot hear: it stays with the first."""
    first, second, _ = CONTROLLERS
    at_s = draw.uniform(1, max(part.most_s * 0.6, 3.0))
    faults = [
        _of("takeover", at_s, 6.0, first),
        *(_of("partition", at_s, 6.0, app, other=second) for app in APPS),
    ]
    faults = [replace(fault, number=next(numbers)) for fault in faults]
    faults = [fault for fault in faults if not any(_clash(fault, other) for other in part.faults)]
    ordered = sorted((*part.faults, *faults), key=lambda fault: (fault.at_s, fault.number))
    return replace(part, faults=tuple(ordered), most_s=max(part.most_s, 10.0))


def _of(kind: str, at_s: float, for_s: float, one: str, *, other: str = "") -> Fault:
    return Fault(number=0, kind=kind, at_s=at_s, for_s=for_s, one=one, other=other, amount=0.9, draw=0.5)


def _draw_fault_of_copies(draw: random.Random, most_s: float) -> Fault:
    one, other = draw.sample(list(CONTROLLERS), 2)
    kind = draw.choice(("kill", "pause", "partition", "partition", "promote", "promote", "failing-flush"))
    return Fault(
        number=0,
        kind=kind,
        at_s=draw.uniform(0, most_s * 0.8),
        for_s=draw.choice((draw.uniform(0.01, 2.0), draw.uniform(3.0, 15.0))),
        one=one,
        other=other if kind == "partition" else "",
        amount=draw.random(),
        draw=draw.random(),
    )


def _with_failovers(draw: random.Random, part: Round, numbers) -> Round:
    """Return the round with faults of controllers that share a store: of the master as a rule."""
    controllers = list(CONTROLLERS)
    faults = [
        Fault(
            number=next(numbers),
            kind=draw.choice(("kill", "pause", "cut-from-store", "cut-from-store")),
            at_s=draw.uniform(0, max(part.most_s, 10.0) * 0.8),
            for_s=draw.choice((draw.uniform(0.01, 2.0), draw.uniform(3.0, 15.0))),
            one=draw.choice((*controllers, controllers[0], controllers[0])),
            amount=draw.random(),
            draw=draw.random(),
        )
        for _ in range(draw.choice((1, 2, 3)))
    ]
    # A master that cannot be heard cannot know a copy of a pool from one that lives.
    faults = [fault for fault in faults if not any(_clash(fault, other) for other in part.faults)]
    ordered = sorted((*part.faults, *faults), key=lambda fault: (fault.at_s, fault.number))
    return replace(part, faults=tuple(ordered), most_s=max(part.most_s, 10.0))


def _with_reads_of_damage(draw: random.Random, shape: Shape, part: Round, sizes: set[int], numbers) -> Round:
    """Return the round with files that are read soon after some of their shards were damaged."""
    names = [f"docs/read-{number}" for number in range(4)]
    puts = [
        Operation(
            number=next(numbers),
            client=0,
            verb=Verb.PUT,
            name=name,
            size=max(_draw_size(draw, shape, sizes) for _ in range(3)),
            layout=draw.choice(("1+2", "2+1", "2+2")),
        )
        for name in names
    ]
    # Of a part of a file: a client knows the hash of the whole.
    gets = [
        Operation(
            number=next(numbers),
            client=0,
            verb=Verb.GET_RANGE,
            name=name,
            pause_s=0.0 if number else 2.5,
            draw=draw.uniform(0.1, 0.9),
        )
        for number, name in enumerate(names * 2)
    ]
    flips = [
        Fault(
            number=next(numbers),
            kind="bit-flip",
            at_s=2.0,
            for_s=0.1,
            one=pool,
            amount=draw.uniform(0, 0.8),
            draw=draw.random(),
        )
        for pool in shape.pools
    ]
    return Round(
        operations=(*puts, *gets, *part.operations),
        faults=(*part.faults, *flips),
        most_s=max(6.0, part.most_s),
    )


def _with_moves(draw: random.Random, shape: Shape, part: Round, sizes: set[int], numbers) -> Round:
    """Return the round with a disk that fails for writes and is emptied, slowly, while all pools ask around."""
    puts = [
        Operation(
            number=next(numbers),
            client=0,
            verb=Verb.PUT,
            name=f"docs/moved-{number}",
            size=_draw_size(draw, shape, sizes),
            layout=draw.choice(("1+1", "2+1", "1+2", "2+2")),
        )
        for number in range(6)
    ]
    failing = draw.choice(shape.pools)
    faults = [
        Fault(number=next(numbers), kind="failing-flush", at_s=2.0, for_s=60.0, one=failing),
        *(
            Fault(
                number=next(numbers),
                kind="slow-disk",
                at_s=draw.uniform(2, 4),
                for_s=60.0,
                one=one,
                amount=draw.uniform(0.3, 0.8),
            )
            for one in (*shape.pools, next(iter(CONTROLLERS)))
            if one != failing
        ),
    ]
    calm = [fault for fault in part.faults if draw.random() < 0.3]
    return Round(
        operations=(*puts, *part.operations, _waiting(next(numbers))), faults=(*calm, *faults), most_s=40.0
    )


def _with_late_verdicts(draw: random.Random, shape: Shape, sizes: set[int], numbers) -> Round:
    """Return a round in which a pool is out, comes back with a damaged disk, and is needed again at once.

    What it holds is dead, for it was rebuilt elsewhere; the answer that says so is late, and meanwhile another
    pool is given up, whose shards are rebuilt where they were first.
    """
    puts = [
        Operation(
            number=next(numbers),
            client=number % shape.clients,
            verb=Verb.PUT,
            name=f"docs/late-{number}",
            size=_draw_size(draw, shape, sizes),
            layout=draw.choice(("1+2", "2+2", "1+1")),
        )
        for number in range(12)
    ]
    away, given_up = draw.sample(shape.pools, 2)
    back_s = draw.uniform(15, 17)
    faults = [
        Fault(number=next(numbers), kind="kill", at_s=3.0, for_s=back_s - 3.0, one=away),
        Fault(number=next(numbers), kind="rotten-disk", at_s=back_s - 0.5, for_s=0.1, one=away),
        Fault(number=next(numbers), kind="late-verdicts", at_s=back_s - 0.2, for_s=10.0, one=away),
        Fault(
            number=next(numbers),
            kind="replace-pool",
            at_s=back_s + draw.uniform(0.2, 1.0),
            for_s=0.1,
            one=given_up,
            amount=1.0,
            draw=0.1,
        ),
    ]
    return Round(operations=(*puts, _waiting(next(numbers))), faults=tuple(faults), most_s=back_s + 14)


def _waiting(number: int) -> Operation:
    """Return an operation that keeps a round from ending before its time."""
    return Operation(number=number, client=1, verb=Verb.STAT, name="docs/a", pause_s=60.0)


def _with_long_put(draw: random.Random, shape: Shape, part: Round, sizes: set[int], numbers) -> Round:
    """Return the round with a put that lasts until a pool is out that took shards of it."""
    extent = shape.chunk_size * EXTENT_CHUNKS
    size = next(size for size in range(8 * extent, 9 * extent) if size not in sizes)
    sizes.add(size)
    put = Operation(
        number=next(numbers),
        client=0,
        verb=Verb.PUT,
        name="docs/a",
        size=size,
        layout=draw.choice(("2+2", "1+2", "3+2")),
        patience_s=120.0,
        dawdle_s=3.0,
    )
    kind = _pick(draw, {"lose-disk": 2, "replace-pool": 1, "kill": 1, "partition": 2})
    fault = Fault(
        number=next(numbers),
        kind=kind,
        at_s=draw.uniform(13, 20),
        for_s=40.0,
        one=draw.choice(shape.pools),
        other=next(iter(CONTROLLERS)) if kind == "partition" else "",
        amount=draw.random(),
        draw=draw.random(),
    )
    others = (
        one for one in part.faults if "app-" not in one.one + one.other
    )  # With its app, the put would end.
    return Round(operations=(put, *part.operations), faults=(*others, fault), most_s=50.0)


def _draw_shape(draw: random.Random) -> Shape:
    pools = draw.randint(4, 8)
    machines = draw.choice((1, 2, 3, pools, pools))
    heartbeat_s = draw.choice((1.0, 1.0, 2.0))
    room = draw.choice((300_000, 1_000_000, 10_000_000))
    return Shape(
        machines=tuple(f"machine-{number % machines}" for number in range(pools)),
        capacities=tuple(room if draw.random() < 0.8 else room // 4 for _ in range(pools)),
        apps=draw.choice((1, 2)),
        clients=draw.randint(2, 4),
        chunk_size=draw.choice((256, 512, 1024)),
        buffer_chunks=draw.choice((2, 4, 8)),
        most_transfers=draw.choice((1, 2, 8)),
        delay_s=draw.choice(((0.0001, 0.001), (0.0001, 0.02), (0.001, 0.005))),
        silence_s=draw.choice((3.0, 6.0)),
        heartbeat_s=heartbeat_s,
        down_after_s=heartbeat_s * draw.choice((3, 5)),
        replace_after_s=draw.choice((12.0, 12.0, 25.0)),
        scrub_every_s=draw.choice((5.0, 20.0, 40.0)),
        session_lease_s=draw.choice((8.0, 20.0)),
        delete_grace_s=draw.choice((0.5, 2.0, 8.0)),
        housekeeping_s=draw.choice((0.5, 2.0)),
        review_s=draw.choice((1.5, 5.0, 20.0)),
        idle_s=draw.choice((8.0, 30.0)),
    )


def _draw_operations(
    draw: random.Random, shape: Shape, folder: list[str], most_s: float, sizes: set[int], numbers
) -> tuple[Operation, ...]:
    operations = []
    bind = draw.random() < 0.7  # Moves and copies bind names together, which makes the search harder.
    for client in range(shape.clients):
        count = draw.randint(3, 14)
        pause_s = most_s / count * draw.choice((0.1, 0.5, 0.9))
        for _ in range(count):
            verb = _pick(draw, _VERBS)
            if verb in (Verb.MOVE, Verb.COPY) and not bind:
                verb = Verb.PUT
            when = _pick(draw, _CONDITIONS)
            size = _draw_size(draw, shape, sizes) if verb is Verb.PUT else 0
            operations.append(
                Operation(
                    number=next(numbers),
                    client=client,
                    verb=verb,
                    name=draw.choice(folder),
                    target=draw.choice(folder) if verb in (Verb.MOVE, Verb.COPY) else "",
                    when=when,
                    size=size,
                    layout=draw.choice(_LAYOUTS) if verb is Verb.PUT else "",
                    pause_s=draw.choice((0.0, 0.01, draw.expovariate(1 / pause_s), 2 * pause_s)),
                    patience_s=draw.choice((0.02, 5.0, 20.0, 20.0, 20.0, 20.0)),
                    dawdle_s=draw.choice((0.0, 0.0, 0.0, 0.0, 0.05, 0.4)),
                    draw=draw.random(),
                )
            )
    return tuple(operations)


def _draw_size(draw: random.Random, shape: Shape, taken: set[int]) -> int:
    extent = shape.chunk_size * EXTENT_CHUNKS
    while True:
        size = draw.choice(
            (
                draw.randint(0, 40),
                draw.randint(1, SMALL_SIZE),
                draw.randint(SMALL_SIZE - 10, SMALL_SIZE + 10),
                draw.randint(SMALL_SIZE + 1, max(SMALL_SIZE + 2, 3 * extent)),
                draw.randint(1, 3) * extent + draw.randint(-2, 2),
            )
        )
        if size not in taken and size >= 0:
            taken.add(size)
            return size


def _draw_faults(draw: random.Random, shape: Shape, most_s: float, numbers) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    for _ in range(draw.choice((0, 2, 4, 6, 9))):
        fault = _draw_fault(draw, shape, most_s, next(numbers))
        if not any(_clash(fault, other) for other in faults):
            faults.append(fault)
    return tuple(sorted(faults, key=lambda fault: (fault.at_s, fault.number)))


def _draw_fault(draw: random.Random, shape: Shape, most_s: float, number: int) -> Fault:
    apps = list(APPS)[: shape.apps]
    controller = next(iter(CONTROLLERS))
    sort = draw.choices(("pool", "app", "controller", "link"), (10, 2, 3, 4))[0]
    other = ""
    if sort == "pool":
        kind, one = _pick(draw, _POOL_FAULTS), draw.choice(shape.pools)
        if kind == "swap-disks":
            other = draw.choice([pool for pool in shape.pools if pool != one])
    elif sort == "app":
        kind, one = _pick(draw, _APP_FAULTS), draw.choice(apps)
    elif sort == "controller":
        kind, one = _pick(draw, _CONTROLLER_FAULTS), controller
    else:
        kind = _pick(draw, _LINK_FAULTS)
        clients = [f"client-{client}" for client in range(shape.clients)]
        one, other = draw.choice(
            (
                (draw.choice(apps), draw.choice(shape.pools)),
                (draw.choice(shape.pools), controller),
                (draw.choice(apps), controller),
                (draw.choice(clients), draw.choice(apps)),
            )
        )
        if draw.random() < 0.5:
            one, other = other, one
    return Fault(
        number=number,
        kind=kind,
        at_s=draw.uniform(0, most_s * 0.8),
        for_s=draw.choice((draw.uniform(0.01, 1.0), draw.uniform(1.0, 12.0))),
        one=one,
        other=other,
        amount=draw.random(),
        draw=draw.random(),
    )


def _clash(fault: Fault, other: Fault) -> bool:
    if not {fault.kind, other.kind} & _EXCLUSIVE:
        return False
    both = ({one.one, one.other} - {""} for one in (fault, other))
    kinds = {fault.kind, other.kind}
    return bool(set.intersection(*both)) or (
        "clone" in kinds and "kill" not in kinds and bool({fault.one, other.one} & set(CONTROLLERS))
    )
