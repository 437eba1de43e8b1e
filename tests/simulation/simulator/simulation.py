"""Execute a plan: one cluster, its clients and its faults, under the eyes of the checkers."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass

import trio

from tests.simulation.simulator.checks.bounds import Bounds
from tests.simulation.simulator.checks.losses import OutPoolsDoNotCount
from tests.simulation.simulator.checks.reads import check_history
from tests.simulation.simulator.checks.rest import RESTS, check_readable, unrest, untruth
from tests.simulation.simulator.checks.shards import CommitsNameFlushedShards, LiveShardsStay, check_placed
from tests.simulation.simulator.checks.terms import TermsInForce
from tests.simulation.simulator.checks.versions import DeadStayDead, check_indexes
from tests.simulation.simulator.cluster import NO_CRASH, Cluster
from tests.simulation.simulator.faults import inflict
from tests.simulation.simulator.plan import Plan, Round
from tests.simulation.simulator.scale import small_scale
from tests.simulation.simulator.surroundings import run_mocked
from tests.simulation.simulator.trace import Trace
from tests.simulation.simulator.workload import Person, attend
from tests.simulation.simulator.world import Violation, World

log = logging.getLogger("droppex.simulator")

LOOK_S = 0.5
"""Between two looks of the checkers that look at everything."""
REST_S = 120.0
"""A cluster that is not at rest so long after the last fault does not come to rest."""
READY_S = 30.0
MAP_S = 2.5
"""After so long the apps have heard of all pools."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run."""

    violation: Violation | None
    digest: str
    deliveries: int
    seconds: float
    """Of the mock clock."""
    decided: bool
    """Whether the search for a linearization came to an end."""
    happened: Counter[str]
    """How often what was planned took place: faults by kind, operations by verb and outcome."""
    lines: list[str]


class Simulation:
    """One run of one plan."""

    def __init__(self, plan: Plan, *, messages: bool = False, ignoring: Collection[str] = ()) -> None:
        self._plan = plan
        self._trace = Trace(messages=messages)
        self._world = World(ignoring)
        self._bounds = Bounds(self._world)
        for checker in (TermsInForce, DeadStayDead, LiveShardsStay, CommitsNameFlushedShards):
            checker(self._world)
        self._out_pools = OutPoolsDoNotCount(self._world)
        self._decided = True
        self._seconds = 0.0
        self._world.put_of_size = {
            operation.size: operation.number for operation in plan.operations if operation.verb == "put"
        }

    def run(self, mutate: Callable[[ExitStack], None] = lambda _: None) -> Result:
        """Run the plan; `mutate` may break the code for as long as that lasts."""
        world = self._world
        with ExitStack() as stack:
            stack.enter_context(small_scale(self._plan.shape.most_transfers))
            mutate(stack)
            self._out_pools.watch(stack)
            stack.enter_context(self._bounds.watching())
            collecting = gc.isenabled()
            gc.disable()  # Objects that are ended by the collector would end at another moment each time.
            try:
                run_mocked(self._main, seed=self._plan.seed)
            except* Exception as errors:
                world.report(NO_CRASH, f"the client ended with a bug: {errors.exceptions!r}")
                log.exception("seed %d: the client ended with a bug", self._plan.seed)
            finally:
                if collecting:
                    gc.enable()
        if world.violation is None:
            self._decided = check_history(world)
        return Result(
            violation=world.violation,
            digest=self._trace.digest(),
            deliveries=self._trace.deliveries,
            seconds=self._seconds,
            decided=self._decided,
            happened=world.happened,
            lines=self._trace.lines,
        )

    async def _main(self) -> None:
        plan, world = self._plan, self._world
        async with trio.open_nursery() as nursery:
            world.on_violation = nursery.cancel_scope.cancel
            cluster = Cluster(nursery, plan.seed, plan.shape, world, self._trace)
            cluster.names = sorted(
                {name for one in plan.operations for name in (one.name, one.target) if name}
            )
            cluster.start_all()
            nursery.start_soon(self._look_on)
            people = [
                await nursery.start(attend, number, cluster, plan.seed)
                for number in range(plan.shape.clients)
            ]
            operator = await nursery.start(attend, plan.shape.clients, cluster, plan.seed)
            cluster.replace_pool = operator.replace_pool
            cluster.drain_pool, cluster.remove_pool = operator.drain_pool, operator.remove_pool
            cluster.promote = operator.promote
            if plan.shape.copies:
                nursery.start_soon(operator.see_to_a_master)
            await self._all_ready(cluster)
            await trio.sleep(MAP_S)
            for number, part in enumerate(plan.rounds):
                await self._round(cluster, people, part, number)
            nursery.cancel_scope.cancel()
        self._seconds = trio.current_time()

    async def _look_on(self) -> None:
        while True:
            await trio.sleep(LOOK_S)
            self._look()

    def _look(self) -> None:
        check_placed(self._world)
        check_indexes(self._world)
        self._bounds.check()

    async def _all_ready(self, cluster: Cluster) -> None:
        with trio.move_on_after(READY_S):
            while not (all(process.ready for process in cluster.processes.values()) and cluster.all_follow()):
                await trio.sleep(0.1)

    async def _round(self, cluster: Cluster, people: list[Person], part: Round, number: int) -> None:
        stop = trio.Event()

        async def work() -> None:
            with trio.move_on_after(part.most_s):
                async with trio.open_nursery() as workers:
                    for client, person in enumerate(people):
                        own = [one for one in part.operations if one.client == client]
                        workers.start_soon(person.work, own)
            stop.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(inflict, cluster, part.faults, stop)
        self._trace.say(f"round {number} is over; the faults are, too")
        cluster.start_all()
        await self._rest(cluster, people[0])
        await check_readable(people[0], cluster, 10_000 * (number + 1))

    async def _rest(self, cluster: Cluster, person: Person) -> None:
        deadline = trio.current_time() + REST_S
        while True:
            reason = unrest(cluster, self._bounds)
            if not reason:
                reason = await untruth(person, cluster)
            if not reason:
                return
            if trio.current_time() >= deadline:
                self._world.report(RESTS, f"{REST_S:g} s after the faults: {reason}")
            await trio.sleep(1.0)


def simulate(
    plan: Plan,
    *,
    messages: bool = False,
    mutate: Callable[[ExitStack], None] = lambda _: None,
    ignoring: Collection[str] = (),
) -> Result:
    """Run a plan in a cluster of its own and return what came of it. Deterministic.

    Violations of the invariants `ignoring` are not noticed, to see what comes of them.
    """
    return Simulation(plan, messages=messages, ignoring=ignoring).run(mutate)
