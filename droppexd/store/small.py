"""A small shard as the database has it, for who verifies it."""

from droppexd.errors import IntegrityError, NoSuchShard
from droppexd.held import holding_of
from droppexd.store.header_file import unseal
from droppexd.store.index_reader import Row


class ExaminedSmall:
    """A small shard whose row was read whole."""

    __slots__ = ("_piece", "generation", "header")

    def __init__(self, row: Row) -> None:
        self.header = unseal(row.header)
        self.generation = row.generation
        self._piece = row.piece

    def read(self, chunk: int) -> tuple[bytes, bytes]:
        """Return piece and checksum of the only chunk."""
        if chunk != 0:
            raise NoSuchShard(f"the shard has 1 chunk, no chunk {chunk}")
        return self._piece, self.header.checksums[0]


def examine_small(key: bytes, row: Row) -> ExaminedSmall:
    """Return the small shard of a row; raise IntegrityError when its header is damaged or another's."""
    shard = ExaminedSmall(row)
    held = holding_of(key, row.generation)
    header = shard.header
    if (header.extent, header.index) != (held.extent, held.shard):
        raise IntegrityError(f"the database holds shard {header.index} of extent {header.extent} here")
    return shard
