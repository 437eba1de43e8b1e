"""A whole catalogue from one engine to another: all of it, or nothing that anybody takes for one."""

import random
from pathlib import Path

import pytest
import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.copying import copy_catalogue
from droppexd.catalog.engine import Operation
from droppexd.catalog.keys import TERM, TERMS
from droppexd.catalog.places import Place, parse_place
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.errors import CatalogError, ConfigError, Conflict
from droppexd.runtime import Runtime


class Clock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1_700_000_000_000


class Entropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)


RUNTIME = Runtime(clock=Clock(), entropy=Entropy(), run_blocking=None)


async def filled(keys=5000):
    """Return an engine with a catalogue, and many more keys."""
    engine = SimulatedEngine(RUNTIME)
    async with open_catalogue(engine, RUNTIME) as catalogue:
        await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))
    await engine.txn([], [Operation(b"z/%05d" % key, b"%d" % key * 20) for key in range(keys)])
    return engine


def present(engine, *, but_terms=False):
    """Return what is there, if need be without what tells of revisions: a copy begins a term of its own."""
    left_out = (TERM, TERMS) if but_terms else ()
    return {key: entry.value for key, entry in engine.disk.entries.items() if key not in left_out}


def nobody(_done, _total):
    pass


def test_everything_is_copied_and_it_is_the_same_catalogue():
    async def main():
        source, target = await filled(), SimulatedEngine(RUNTIME)
        steps = []
        copied = await copy_catalogue(source, target, lambda done, total: steps.append((done, total)))
        assert present(target, but_terms=True) == present(source, but_terms=True)
        assert copied == len(present(source, but_terms=True))
        assert steps[-1] == (2 * copied, 2 * copied)
        async with open_catalogue(source, RUNTIME) as one, open_catalogue(target, RUNTIME) as other:
            assert (one.cluster_id, one.incarnation) == (other.cluster_id, other.incarnation)
            assert other.term > one.term
            assert one.sessions.keys() == other.sessions.keys()

    trio.run(main)


class Breaking(SimulatedEngine):
    """Takes so many transactions and no more."""

    most_bytes = 40_000

    def __init__(self, disk, left):
        super().__init__(RUNTIME, disk)
        self.left = left

    async def txn(self, compare, then):
        if not self.left:
            raise CatalogError("no more")
        self.left -= 1
        return await super().txn(compare, then)


@pytest.mark.parametrize("taken", [0, 1, 2, 7, 30])
def test_a_copy_that_broke_off_is_no_catalogue_and_the_next_one_begins_again(taken):
    async def main():
        source, target = await filled(), SimulatedEngine(RUNTIME)
        with pytest.raises(CatalogError, match="no more"):
            await copy_catalogue(source, Breaking(target.disk, taken), nobody)
        if taken:
            await target.txn([], [Operation(b"z/left over", b"")])
            with pytest.raises(CatalogError, match="run `droppexd catalog copy` again"):
                async with open_catalogue(target, RUNTIME):
                    pass
            with pytest.raises(CatalogError, match="no whole catalogue"):
                await copy_catalogue(target, SimulatedEngine(RUNTIME), nobody)
        await copy_catalogue(source, target, nobody)
        assert present(target, but_terms=True) == present(source, but_terms=True)

    trio.run(main)


def test_what_is_there_is_not_touched():
    async def main():
        source, used = await filled(3), await filled(4)
        before = present(used)
        with pytest.raises(Conflict):
            await copy_catalogue(source, used, nobody)
        strange = SimulatedEngine(RUNTIME)
        await strange.txn([], [Operation(b"theirs", b"1")])
        with pytest.raises(CatalogError, match="they are no catalogue"):
            await copy_catalogue(source, strange, nobody)
        assert present(used) == before
        with pytest.raises(CatalogError, match="no whole catalogue"):
            await copy_catalogue(SimulatedEngine(RUNTIME), SimulatedEngine(RUNTIME), nobody)

    trio.run(main)


def test_a_target_that_gives_back_something_else_is_not_put_into_use():
    class Wrong(SimulatedEngine):
        async def get(self, keys):
            found = await super().get(keys)
            return [one and (one._replace(value=b"?") if one.key == b"z/00002" else one) for one in found]

    async def main():
        target = Wrong(RUNTIME)
        with pytest.raises(CatalogError, match="not what is read back"):
            await copy_catalogue(await filled(5), target, nobody)
        assert b"m/cluster" not in target.disk.entries

    trio.run(main)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sqlite:/srv/catalogue.sqlite", Place(Path("/srv/catalogue.sqlite"))),
        ("etcd:http://127.0.0.1:2379", Place(None, ("http://127.0.0.1:2379",))),
        ("etcd:https://a:1,https://b:2/", Place(None, ("https://a:1", "https://b:2"))),
        ("etcd:https://a:1,https://b:2/other/", Place(None, ("https://a:1", "https://b:2"), "other/")),
    ],
)
def test_places_are_read(text, place):
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["", "sqlite:", "etcd:", "etcd:host:1", "mysql:x", "etcd:https://host"])
def test_what_is_no_place_is_told(text):
    with pytest.raises(ConfigError, match="no place of a catalogue"):
        parse_place(text)
