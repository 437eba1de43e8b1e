"""Listings and globs against the obvious way to do them."""

import functools
import itertools

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from droppexd.catalog.engine import Operation
from droppexd.catalog.glob import Glob
from droppexd.catalog.listing import find_names, list_names
from droppexd.catalog.records import Name, pack_name
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.model import VersionId
from droppexd.runtime import Runtime


class FixedClock:
    def now(self):
        return 0.0

    def wall_ms(self):
        return 1


RUNTIME = Runtime(clock=FixedClock(), entropy=None, run_blocking=None)

# Characters around the slash in the order of bytes, and beyond ASCII.
segments = st.text(alphabet="a-.0bé😀", min_size=1, max_size=3)
names = st.lists(segments, min_size=2, max_size=4).map("/".join)
name_sets = st.sets(names, max_size=40)
prefixes = st.one_of(st.just(""), names, names.map(lambda name: name[:2]), segments.map(lambda s: s + "/"))


async def engine_with(found):
    engine = SimulatedEngine(RUNTIME)
    record = pack_name(Name(VersionId(1, 1), 5, 7))
    await engine.txn([], [Operation(b"n/" + name.encode(), record) for name in found])
    await engine.txn([], [Operation(b"m/x", b"1"), Operation(b"o/x", b"1")])
    return engine


def naive_list(found, prefix, recursive):
    listed = set()
    for name in found:
        if name.startswith(prefix):
            folder, slash, _ = name[len(prefix) :].partition("/")
            listed.add(prefix + folder + slash if slash and not recursive else name)
    return sorted(listed, key=str.encode)


@settings(max_examples=150, deadline=None)
@given(name_sets, prefixes, st.booleans(), st.integers(1, 7))
def test_the_pages_of_a_listing_are_the_listing(found, prefix, recursive, limit):
    async def main():
        engine = await engine_with(found)
        listed, after = [], ""
        for _ in range(200):
            page = await list_names(engine, prefix, after, limit, recursive=recursive)
            assert len(page.entries) <= limit
            assert all(entry.folder is entry.name.endswith("/") for entry in page.entries)
            listed += [entry.name for entry in page.entries]
            after = page.next
            if not after:
                break
        assert listed == naive_list(found, prefix, recursive)

    trio.run(main)


@settings(max_examples=100, deadline=None)
@given(name_sets, prefixes, names)
def test_a_listing_begins_after_whatever_name(found, prefix, after):
    async def main():
        engine = await engine_with(found)
        for recursive in (False, True):
            page = await list_names(engine, prefix, after, 1000, recursive=recursive)
            wanted = [name for name in naive_list(found, prefix, recursive) if name.encode() > after.encode()]
            assert [entry.name for entry in page.entries] == wanted

    trio.run(main)


@functools.cache
def naive_match(pattern, name):
    if not pattern:
        return not name
    if pattern.startswith("**"):
        rest = pattern.lstrip("*")
        return any(naive_match(rest, name[i:]) for i in range(len(name) + 1))
    if pattern[0] == "*":
        cut = name.find("/")
        cut = len(name) if cut < 0 else cut
        return any(naive_match(pattern[1:], name[i:]) for i in range(cut + 1))
    if not name:
        return False
    if pattern[0] == "?":
        return name[0] != "/" and naive_match(pattern[1:], name[1:])
    if pattern.startswith("[ab]"):
        return name[0] in "ab" and naive_match(pattern[4:], name[1:])
    return pattern[0] == name[0] and naive_match(pattern[1:], name[1:])


def naive_glob(pattern, name):
    """Try every way to leave out each `**/` that stands at the start of a part."""
    if "/" not in pattern:
        pattern = "**/" + pattern
    parts = pattern.split("/")
    stars = [i for i, part in enumerate(parts[:-1]) if len(part) > 1 and set(part) == {"*"}]
    for left_out in itertools.product([False, True], repeat=len(stars)):
        gone = {i for i, out in zip(stars, left_out, strict=True) if out}
        kept = "/".join(part for i, part in enumerate(parts) if i not in gone)
        if naive_match(kept, name):
            return True
    return False


tokens = st.sampled_from(["a", "b", "é", "-", "/", "*", "**", "**/", "?", "[ab]", "/**/", "*/", "a/"])
patterns = st.lists(tokens, min_size=1, max_size=7).map("".join)


@settings(max_examples=400, deadline=None)
@given(patterns, st.lists(names, max_size=8))
@example("a/**/b", ["a/b", "a/x/b", "axb"])
def test_a_glob_matches_what_trying_everything_matches(pattern, some):
    glob = Glob(pattern)
    for name in some:
        matches = glob.matches(name)
        assert matches is naive_glob(pattern, name)
        if matches:
            assert name.startswith(glob.prefix)


@settings(max_examples=60, deadline=None)
@given(name_sets, patterns, st.integers(1, 5))
def test_the_pages_of_a_find_are_all_that_matches(found, pattern, limit):
    async def main():
        engine = await engine_with(found)
        matched, after = [], ""
        for _ in range(200):
            page = await find_names(engine, pattern, after, limit)
            assert len(page.entries) <= limit
            matched += [entry.name for entry in page.entries]
            after = page.next
            if not after:
                break
        glob = Glob(pattern)
        assert matched == [name for name in sorted(found, key=str.encode) if glob.matches(name)]

    trio.run(main)


@pytest.mark.parametrize("count", [1999, 2000, 2001, 4500])
def test_a_page_of_a_find_examines_a_bounded_number_of_names(count):
    async def main():
        engine = await engine_with({f"f/{i:06d}" for i in range(count)})
        pages = 0
        after = ""
        while True:
            page = await find_names(engine, "nothing", after, 1000)
            assert page.entries == ()
            pages += 1
            after = page.next
            if not after:
                break
            assert after == f"f/{pages * 2000 - 1:06d}"
        assert pages == count // 2000 + 1

    trio.run(main)


def test_a_page_of_very_long_names_fits_into_a_message():
    async def main():
        engine = await engine_with({"f/" + f"{i:04d}" + "x" * 1000 for i in range(900)})
        for pages in (
            await list_names(engine, "f/", "", 1000, recursive=False),
            await find_names(engine, "f/*", "", 1000),
        ):
            assert pages.next
            assert sum(len(entry.name) for entry in pages.entries) < 600_000

    trio.run(main)
