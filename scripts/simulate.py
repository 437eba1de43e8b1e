"""Run simulated clusters by seed; print the seeds that fail, each with a trace cut as short as it can be."""

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count, islice
from typing import NamedTuple

from droppexd.cli.daemon_parent import die_with_parent
from tests.simulation.simulator.generate import draw_plan
from tests.simulation.simulator.minimise import minimise
from tests.simulation.simulator.mutants import MUTANTS
from tests.simulation.simulator.plan import Plan
from tests.simulation.simulator.simulation import Result, simulate

PROGRESS_S = 5.0


class Outcome(NamedTuple):
    """What came of one seed, as it goes from one process to another."""

    seed: int
    violation: str
    invariant: str
    decided: bool
    deliveries: int


def run_plan(plan: Plan, mutant: str, *, messages: bool = False) -> Result:
    """Run a plan, with one rule broken if a mutant is named."""
    if not mutant:
        return simulate(plan, messages=messages)
    broken = MUTANTS[mutant]
    return simulate(plan, messages=messages, mutate=broken.patch, ignoring=broken.ignoring)


def run_seed(job: tuple[int, str]) -> Outcome:
    """Run one seed, in a process of its own or not."""
    seed, mutant = job
    result = run_plan(draw_plan(seed), mutant)
    wrong = result.violation
    return Outcome(
        seed, str(wrong or ""), wrong.invariant if wrong else "", result.decided, result.deliveries
    )


def outcomes(seeds: Iterator[int], mutant: str, jobs: int) -> Iterator[Outcome]:
    """Yield what comes of the seeds, in any order."""
    if jobs == 1:
        yield from (run_seed((seed, mutant)) for seed in seeds)
        return
    context = multiprocessing.get_context("spawn")
    running: set[Future[Outcome]] = set()
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=start_worker, initargs=(os.getpid(),)
    ) as pool:
        try:
            while True:
                more = islice(seeds, max(0, 2 * jobs - len(running)))
                running |= {pool.submit(run_seed, (seed, mutant)) for seed in more}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)


def be_quiet() -> None:
    """Leave out the log of the roles: in a simulation everything goes wrong."""
    logging.disable(logging.CRITICAL)


def start_worker(parent: int) -> None:
    """Prepare a process that runs seeds for the process `parent`, and ends when that one does."""
    die_with_parent(parent)
    be_quiet()


def until(seeds: Iterator[int], deadline: float) -> Iterator[int]:
    """Yield seeds until then."""
    for seed in seeds:
        if time.monotonic() >= deadline:
            return
        yield seed


def show(plan: Plan, mutant: str, *, messages: bool) -> None:
    """Print what a plan does."""
    result = run_plan(plan, mutant, messages=messages)
    print(f"cluster: {plan.shape}")
    print("\n".join(result.lines))
    print(f"trace {result.digest}, {result.deliveries} messages, {result.seconds:.1f} s of mock time")
    print(f"violated: {result.violation}" if result.violation else "clean")


def show_failure(outcome: Outcome, mutant: str) -> None:
    """Cut a failing seed down and print what is left."""
    plan = draw_plan(outcome.seed)

    def fails(smaller: Plan) -> bool:
        wrong = run_plan(smaller, mutant).violation
        return wrong is not None and wrong.invariant == outcome.invariant

    smallest = minimise(plan, fails)
    print(
        f"\nseed {outcome.seed}, cut from {len(plan.operations)} operations and {len(plan.faults)} faults "
        f"to {len(smallest.operations)} and {len(smallest.faults)}:"
    )
    show(smallest, mutant, messages=False)


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds to run (1000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them (0)")
    parser.add_argument("--seed", type=int, metavar="N", help="run this one, and print what happens")
    parser.add_argument("--messages", action="store_true", help="with --seed: print every message, too")
    parser.add_argument("--minutes", type=float, metavar="N", help="go on for so long, or to the last seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument(
        "--mutant",
        default="",
        choices=list(MUTANTS),
        metavar="NAME",
        help="break a rule, and see it noticed: " + ", ".join(MUTANTS),
    )
    parser.add_argument("--most-failures", type=int, default=5, metavar="N", help="stop after so many (5)")
    return parser.parse_args()


def run_many(asked: argparse.Namespace) -> list[Outcome]:
    """Run seeds, tell how it goes, and return what failed."""
    if asked.seeds is None and asked.minutes is None:
        asked.seeds = 1000
    seeds: Iterator[int] = count(asked.first)
    if asked.seeds is not None:
        seeds = iter(range(asked.first, asked.first + asked.seeds))
    if asked.minutes is not None:
        seeds = until(seeds, time.monotonic() + asked.minutes * 60)
    began = told = time.monotonic()
    failed: list[Outcome] = []
    done = messages = undecided = 0
    for outcome in outcomes(seeds, asked.mutant, asked.jobs):
        done += 1
        messages += outcome.deliveries
        undecided += not outcome.decided
        if outcome.violation:
            failed.append(outcome)
            print(f"seed {outcome.seed} violates {outcome.violation.splitlines()[0]}", flush=True)
        if not outcome.decided:
            print(f"seed {outcome.seed}: the search for a linearization was given up", flush=True)
        now = time.monotonic()
        if now - told >= PROGRESS_S:
            told = now
            print(f"{done} seeds, {messages} messages, {now - began:.0f} s", file=sys.stderr, flush=True)
        if len(failed) >= asked.most_failures:
            break
    spent = time.monotonic() - began
    print(
        f"{done} seeds, {messages} messages in {spent:.0f} s: {len(failed)} failed, {undecided} undecided; "
        f"the first was {asked.first}"
    )
    return failed


def main() -> int:
    """Return the exit code: 1 when a seed failed."""
    asked = arguments()
    be_quiet()
    if asked.seed is not None:
        show(draw_plan(asked.seed), asked.mutant, messages=asked.messages)
        return int(bool(run_seed((asked.seed, asked.mutant)).violation))
    failed = run_many(asked)
    for outcome in sorted(failed):
        show_failure(outcome, asked.mutant)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
