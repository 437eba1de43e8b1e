"""Run `droppexd` as it is, and note each answer of a role in its own trace at the moment it is given.

    python recorded.py NOTES ARGUMENTS-OF-DROPPEXD...

A note is one write of one line to the file NOTES. So the trace shows what had been asked of the disk when a
role promised something. Nothing else differs, apart from a few limits that are lowered so that checkpoints
and the giving back of space come within a short load, and a smaller ballast, which has no content.
"""

import functools
import json
import os
import sys

from droppexd.catalog import sqlite as catalogue_file
from droppexd.catalog.transactions import WaitingTxn
from droppexd.cli.daemon import main
from droppexd.errors import DroppexError
from droppexd.store import index
from droppexd.store.disk import open_disk_store
from droppexd.wire import rpc
from droppexd.wire.messages import Announce, Commit, Heartbeat, Remove, Rename, Review, WritePiece

CATALOGUE_CHECKPOINT_PAGES = 40
INDEX_CHECKPOINT_BYTES = 384 * 1024
INDEX_CROWDED_PAGES = 48
INDEX_KEPT_FREE_PAGES = 8
INDEX_VACUUM_PAGES = 8
BALLAST_BYTES = 256 * 1024


def lower_limits():
    catalogue_file._CHECKPOINT_PAGES = CATALOGUE_CHECKPOINT_PAGES
    index.CHECKPOINT_BYTES = INDEX_CHECKPOINT_BYTES
    index.CROWDED_WAL_PAGES = INDEX_CROWDED_PAGES
    index.KEPT_FREE_PAGES = INDEX_KEPT_FREE_PAGES
    index.VACUUM_PAGES = INDEX_VACUUM_PAGES
    open_disk_store.__kwdefaults__["ballast_bytes"] = BALLAST_BYTES


def described(request, reply):
    """Return what a role promises with this answer, or asks to be dropped; None when nothing."""
    match request:
        case WritePiece():
            return {
                "extent": str(request.extent),
                "index": request.index,
                "chunk": request.chunk,
                "checksum": request.checksum.hex(),
                "generation": reply.generation,
            }
        case Review():
            return {
                "pool": request.number,
                "drop": [[str(holding.extent), holding.shard, holding.generation] for holding in reply.drop],
            }
        case Announce():
            return {
                "name": request.name,
                "number": reply.number,
                "pool_id": request.pool_id.hex(),
                "boot_id": request.boot_id.hex(),
                "cluster_id": reply.cluster_id.hex(),
            }
        case Heartbeat():
            return {"number": request.number}
        case Commit():
            return {"name": request.name, "version": str(request.version.id)}
        case Remove():
            return {"name": request.name, "version": str(reply.version)}
        case Rename():
            return {"source": request.source, "name": request.target, "version": str(reply.version)}
        case _:
            return None


def note_answers(descriptor):
    def note(kind, fields):
        os.write(descriptor, (json.dumps([kind, fields]) + "\n").encode())

    answer = rpc._Server._answer
    succeed = WaitingTxn.succeed

    @functools.wraps(answer)
    def noting_answer(server, peer, request, request_id, result):
        if not isinstance(result, DroppexError):
            reply = result[0] if type(result) is tuple else result
            fields = described(request, reply)
            if fields is not None:
                note(type(request).__name__, fields)
        answer(server, peer, request, request_id, result)

    @functools.wraps(succeed)
    def noting_succeed(waiting, revision):
        if revision is not None:
            note("revision", {"revision": revision})
        succeed(waiting, revision)

    rpc._Server._answer = noting_answer
    WaitingTxn.succeed = noting_succeed


if __name__ == "__main__":
    notes = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    lower_limits()
    note_answers(notes)
    main()
