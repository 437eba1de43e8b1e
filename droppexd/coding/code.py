"""The code, as matrices over GF(2^8). reedsolo defines it; nothing here invents a coefficient.

A codeword has k data symbols and m parity symbols, `RSCodec(m, nsize=k+m)`, systematic, polynomial 0x11d.
The code is linear: what it does to the k unit vectors says what it does to everything. So the matrices
are read off by letting reedsolo encode, or decode with erasures, one unit vector after another, and
kernels then apply them to whole pieces. Everything here is pure and cached, and safe to call from threads.
"""

import threading
from functools import lru_cache

from reedsolo import RSCodec

from droppexd.errors import InvalidRequest, NotEnoughShards
from droppexd.model import MAX_K, MAX_M, Layout

Matrix = tuple[bytes, ...]
"""Rows of coefficients; row r gives output r as the sum of coefficient times source."""

LAYOUTS_CACHED = 64
REBUILDS_CACHED = 1024
"""Erasure patterns remembered: 4+2 has 57, 8+3 has 561. At most 1.3 KB each."""

# RSCodec fills module-wide tables while it is constructed, and every call reads them: one at a time.
_reedsolo_lock = threading.Lock()


@lru_cache(maxsize=LAYOUTS_CACHED)
def parity_matrix(layout: Layout) -> Matrix:
    """Return m rows of k coefficients: what makes the parity pieces from the data pieces.

    Raise InvalidRequest when the layout is out of bounds.
    """
    codec = _codec(layout)
    with _reedsolo_lock:
        columns = [bytes(codec.encode(_unit(layout.k, i)))[layout.k :] for i in range(layout.k)]
    return _rows(columns, layout.m)


@lru_cache(maxsize=REBUILDS_CACHED)
def rebuild_matrix(layout: Layout, present: tuple[int, ...], wanted: tuple[int, ...]) -> Matrix:
    """Return one row a wanted shard, of coefficients over the first k of the sorted `present` shards.

    `wanted` may name data and parity shards, also present ones. Raise NotEnoughShards when fewer than k
    are present, InvalidRequest when a shard is not one of the layout.
    """
    for index in (*present, *wanted):
        if not 0 <= index < layout.total:
            raise InvalidRequest(f"shard {index} is not one of layout {layout}")
    distinct = sorted(set(present))
    if len(distinct) < layout.k:
        missing = [f"shard {index}" for index in range(layout.total) if index not in distinct]
        raise NotEnoughShards(
            f"{len(distinct)} of {layout.total} shards can be read; layout {layout} needs {layout.k}", missing
        )
    rows = _decoding_matrix(layout, tuple(distinct[: layout.k]))
    return tuple(rows[index] for index in wanted)


@lru_cache(maxsize=REBUILDS_CACHED)
def _decoding_matrix(layout: Layout, sources: tuple[int, ...]) -> Matrix:
    """Return a row for every shard of the layout, over these k sources."""
    codec = _codec(layout)
    erased = [index for index in range(layout.total) if index not in sources]
    with _reedsolo_lock:
        # The second item that decode returns is the whole codeword, parity included.
        columns = [
            bytes(codec.decode(_unit(layout.total, source), erase_pos=erased, only_erasures=True)[1])
            for source in sources
        ]
    return _rows(columns, layout.total)


@lru_cache(maxsize=256)
def multiplication_table(coefficient: int) -> bytes:
    """Return the 256 products of a coefficient, for `bytes.translate`."""
    codec = _codec(Layout(1, 1))
    log, exp = codec.gf_log, codec.gf_exp
    if coefficient == 0:
        return bytes(256)
    return bytes([0, *(exp[log[coefficient] + log[value]] for value in range(1, 256))])


@lru_cache(maxsize=LAYOUTS_CACHED)
def _codec(layout: Layout) -> RSCodec:
    if not (1 <= layout.k <= MAX_K and 0 <= layout.m <= MAX_M):
        raise InvalidRequest(f"layout {layout}: k must be 1 to {MAX_K} and m 0 to {MAX_M}")
    with _reedsolo_lock:
        return RSCodec(layout.m, nsize=layout.total)


def _unit(length: int, position: int) -> bytearray:
    vector = bytearray(length)
    vector[position] = 1
    return vector


def _rows(columns: list[bytes], count: int) -> Matrix:
    return tuple(bytes(column[row] for column in columns) for row in range(count))
