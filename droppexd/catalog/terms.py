"""Which master wrote which part of the log: what copies of a catalogue compare to find where they part.

A term has one master, and each master begins its term with one transaction, which the key `m/term` names. So
two logs in which one revision is of the same term are the same up to it. (That is the Log Matching property
of Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm", USENIX ATC 2014.)
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from droppexd.catalog.engine import Compare, Engine, Entry, Operation
from droppexd.catalog.keys import TERM, TERMS
from droppexd.catalog.records import pack_fields, unpack_fields
from droppexd.errors import CatalogError

MOST_TERMS = 128
"""Terms that are remembered: a copy that was away for more of them is made anew."""


class Position(NamedTuple):
    """How far a log goes. Of two logs the one with the greater position has all that was acknowledged."""

    term: int
    revision: int


class Begun(NamedTuple):
    """A term, and the revision of the transaction that began it."""

    term: int
    revision: int


class History(NamedTuple):
    """The terms of a log, oldest first."""

    begun: tuple[Begun, ...]

    @property
    def term(self) -> int:
        """The last term; 0 when none has begun."""
        return self.begun[-1].term if self.begun else 0

    def term_at(self, revision: int) -> int | None:
        """Return the term that wrote this revision; None when that is forgotten."""
        for begun in reversed(self.begun):
            if begun.revision <= revision:
                return begun.term
        return None

    def end_of(self, term: int) -> int | None:
        """Return the last revision that may be of this term or of one before it; None when that is forgotten.

        For the last term, and for any after it, this is no bound: 2**63 - 1.
        """
        for index, begun in enumerate(self.begun):
            if begun.term > term:
                return begun.revision - 1 if index else None
        return 2**63 - 1


async def read_history(engine: Engine) -> History:
    """Return the terms of an engine's log. Raise CatalogError when the record is damaged."""
    term, terms = await engine.get((TERM, TERMS))
    if term is None:
        return History(())
    return History((*_earlier(terms, term.revision), Begun(_number(term), term.revision)))


def begin_term(number: int, term: Entry | None, terms: Entry | None) -> list[Operation]:
    """Return what a master writes, together, to begin a term after these."""
    operations = [Operation(TERM, pack_fields((number,)))]
    if term is not None:
        earlier = [*_earlier(terms, term.revision), Begun(_number(term), term.revision)][-MOST_TERMS:]
        flat = [number for begun in earlier for number in begun]
        operations.append(Operation(TERMS, pack_fields(flat)))
    return operations


def compare_term(term: Entry | None) -> Compare:
    """Return the condition that no master has begun a term since."""
    return Compare(TERM, term.revision if term else 0)


def unpack_terms(value: bytes) -> tuple[Begun, ...]:
    """Return the record of former terms. Raise CatalogError when it is damaged."""
    flat: Sequence[int] = unpack_fields(value, "terms")
    if len(flat) % 2 or not all(isinstance(number, int) for number in flat):
        raise CatalogError("the catalogue's record of its terms is damaged")
    begun = tuple(map(Begun, flat[::2], flat[1::2]))
    if any(one.term >= two.term or one.revision >= two.revision for one, two in pairwise(begun)):
        raise CatalogError("the catalogue's record of its terms is damaged")
    return begun


def _earlier(terms: Entry | None, before: int) -> tuple[Begun, ...]:
    return tuple(begun for begun in unpack_terms(terms.value) if begun.revision < before) if terms else ()


def _number(term: Entry) -> int:
    number: int = unpack_fields(term.value, "term")[0]
    return number
