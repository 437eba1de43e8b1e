"""A whole catalogue goes from one engine into another, empty one: key by key, as it is.

Everything comes along, the incarnation too: for pools and apps it is the same catalogue at another place. The
mark `m/copying` is written first and goes with the last transaction, so that nobody takes a part of a
catalogue for one; a copy that broke off is cleared away by the next.
"""

from collections.abc import Callable

from droppexd.catalog.engine import Compare, Engine, Entry, Operation
from droppexd.catalog.keys import CLUSTER, COPYING, TERM, TERMS, TOTALS
from droppexd.catalog.records import unpack_fields, unpack_totals
from droppexd.catalog.terms import begin_term
from droppexd.errors import CatalogError, Conflict

Progress = Callable[[int, int], None]
"""Is told how many keys are done, and about how many there are."""

_PAGE = 2000
_EVERYTHING = b"", b"\xff" * 16
_SHARE = 4
"""A transaction takes a fourth of what an engine takes at most: what is around the values counts as well."""

_KEYS_A_FILE = 3
_LEFT_OUT = COPYING, TERM, TERMS
"""The mark; and what tells revisions, which are others in each engine: a copy begins a term of its own."""


async def copy_catalogue(source: Engine, target: Engine, progress: Progress) -> int:
    """Copy all keys; return how many. Nobody may write to either engine meanwhile.

    Raise Conflict when the target has a catalogue, and CatalogError when the source has none or they differ
    in the end.
    """
    cluster, term, totals = await source.get((CLUSTER, TERM, TOTALS))
    if cluster is None or term is None or (await source.get((COPYING,)))[0] is not None:
        raise CatalogError("there is no whole catalogue to copy")
    expected = _KEYS_A_FILE * unpack_totals(totals.value).files if totals else 0
    await _begin(target)
    copied = 0
    last: list[Operation] = []
    async for page in _Pages(source):
        operations = [Operation(entry.key, entry.value) for entry in page]
        last += [one for one in operations if one.key == CLUSTER]
        await _write(target, [one for one in operations if one.key != CLUSTER])
        copied += len(page)
        progress(copied, max(copied, expected))
    await _require_same(source, target, progress, copied)
    begun = begin_term(unpack_fields(term.value, "term")[0] + 1, None, None)
    if await target.txn([Compare(CLUSTER, 0)], [*last, *begun, Operation(COPYING, None)]) is None:
        raise CatalogError("somebody else has begun a catalogue where this one was copied to")
    return copied


async def _begin(target: Engine) -> None:
    """Mark the target, and clear away what an earlier copy left there."""
    cluster, copying = await target.get((CLUSTER, COPYING))
    if cluster is not None:
        raise Conflict("there is a catalogue already where this one is to go")
    if copying is None:
        if await target.range(*_EVERYTHING, 1):
            raise CatalogError(
                "there are keys already where the catalogue is to go, and they are no catalogue"
            )
        await target.txn([Compare(COPYING, 0)], [Operation(COPYING, b"\x91\x01")])
        return
    while page := [one for one in await target.range(*_EVERYTHING, _PAGE) if one.key != COPYING]:
        await target.txn([], [Operation(entry.key, None) for entry in page])


async def _write(target: Engine, operations: list[Operation]) -> None:
    """Write keys, in transactions that the engine takes."""
    some: list[Operation] = []
    size = 0
    for one in operations:
        one_size = len(one.key) + len(one.value or b"")
        if some and size + one_size > target.most_bytes // _SHARE:
            await target.txn([], some)
            some, size = [], 0
        some.append(one)
        size += one_size
    if some:
        await target.txn([], some)


async def _require_same(source: Engine, target: Engine, progress: Progress, copied: int) -> None:
    """Read both again, side by side."""
    done = 0
    async for page in _Pages(source):
        found = await target.get([entry.key for entry in page])
        for entry, there in zip(page, found, strict=True):
            if entry.key != CLUSTER and (there is None or there.value != entry.value):
                raise CatalogError("what was copied is not what is read back; nothing was put into use")
        done += len(page)
        progress(copied + done, 2 * copied)


class _Pages:
    """An asynchronous iterator over all entries of an engine that are to be copied."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._start: bytes | None = _EVERYTHING[0]

    def __aiter__(self) -> "_Pages":
        return self

    async def __anext__(self) -> list[Entry]:
        if self._start is None:
            raise StopAsyncIteration
        page = await self._engine.range(self._start, _EVERYTHING[1], _PAGE)
        self._start = page[-1].key + b"\0" if len(page) == _PAGE else None
        if not page:
            raise StopAsyncIteration
        return [entry for entry in page if entry.key not in _LEFT_OUT]
