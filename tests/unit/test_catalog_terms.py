"""Which term wrote which revision, also when there were many."""

import pytest
import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.engine import Operation
from droppexd.catalog.records import pack_fields
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.catalog.terms import MOST_TERMS, Begun, read_history, unpack_terms
from droppexd.errors import CatalogError
from droppexd.runtime import Runtime
from tests.conformance.test_engine import FixedClock, SomeEntropy, run_inline

RUNTIME = Runtime(clock=FixedClock(), entropy=SomeEntropy(), run_blocking=run_inline)


def test_each_opening_begins_a_term_and_the_history_tells_of_all():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        assert (await read_history(engine)).begun == ()
        for _ in range(3):
            async with open_catalogue(engine, RUNTIME):
                await engine.txn([], [Operation(b"k", b"")])
        async with open_catalogue(engine, RUNTIME, above_term=40):
            pass
        history = await read_history(engine)
        assert history.begun == (Begun(1, 1), Begun(2, 3), Begun(3, 5), Begun(41, 7))
        assert [history.term_at(revision) for revision in (0, 1, 2, 3, 4, 6, 7, 99)] == [
            None,
            1,
            1,
            2,
            2,
            3,
            41,
            41,
        ]
        assert [history.end_of(term) for term in (0, 1, 2, 3, 7, 41)] == [None, 2, 4, 6, 6, 2**63 - 1]

    trio.run(main)


def test_only_so_many_terms_are_remembered():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        for _ in range(MOST_TERMS + 20):
            async with open_catalogue(engine, RUNTIME):
                pass
        history = await read_history(engine)
        assert len(history.begun) == MOST_TERMS + 1
        assert history.term == MOST_TERMS + 20
        assert history.term_at(1) is None
        assert history.end_of(1) is None

    trio.run(main)


@pytest.mark.parametrize("flat", [(1,), (1, 5, 1, 7), (1, 5, 2, 5), ("1", 5), (2, 5, 1, 6)])
def test_a_history_that_cannot_be_is_damaged(flat):
    with pytest.raises(CatalogError, match="damaged"):
        unpack_terms(pack_fields(flat))
