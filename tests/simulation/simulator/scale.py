"""Shrink droppex for the simulation: files of some kilobytes shall be large, and bounds within reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

SMALL_SIZE = 1024
EXTENT_CHUNKS = 4

_SCALED = {
    "droppexd.client.client": {"SMALL_SIZE": SMALL_SIZE},
    "droppexd.client.upload": {"SMALL_SIZE": SMALL_SIZE, "EXTENT_CHUNKS": EXTENT_CHUNKS},
    "droppexd.roles.app": {"SMALL_SIZE": SMALL_SIZE, "EXTENT_CHUNKS": EXTENT_CHUNKS, "_SMALL_AT_ONCE": 4},
    "droppexd.roles.app_relayout": {"SMALL_SIZE": SMALL_SIZE},
    "droppexd.roles.app_upload": {"SMALL_SIZE": SMALL_SIZE, "EXTENT_CHUNKS": EXTENT_CHUNKS},
    "droppexd.roles.pool_reconcile": {"_MOST_DOUBTFUL": 8, "PAGE_LIMIT": 7, "MOST_HELD": 16},
    "droppexd.roles.pool_rebuild": {"SMALL_SIZE": SMALL_SIZE, "_SMALL_AT_ONCE": 3, "MAX_ORDERS": 6},
    "droppexd.roles.controller_repair": {"PLANNED": 16, "PLAN_AGAIN": 8, "PAGE": 4, "BACKED_OFF": 8},
    "droppexd.roles.controller_care": {"PAGE": 5},
    "droppexd.roles.scrub_record": {"SLICES": 10, "MOST_FINDINGS": 5},
    "droppexd.roles.pool_scrub": {"STRETCH_SHARDS": 3, "_SAVE_S": 4.0, "_MOST_UNTOLD": 4},
    "droppexd.catalog.reconciling": {"MOST_AT_ONCE": 7, "MOST_SLICES": 2},
    "droppexd.catalog.uploads": {"EXTENT_CHUNKS": EXTENT_CHUNKS, "MAX_UPLOADS": 4},
    "droppexd.catalog.repairs": {"RELEASE_AT_ONCE": 3},
    "droppexd.roles.pool_writer": {
        "SMALL_SIZE": SMALL_SIZE,
        "_MOST_STREAMS": 16,
        "_MOST_SMALL": 8,
        "_GROUP": 3,
        "_FAILURES_KEPT": 4,
    },
    "droppexd.store.checks": {"SMALL_SIZE": SMALL_SIZE},
    "droppexd.catalog.catalogue": {"MAX_BATCH": 4, "MAX_BATCH_KEYS": 64},
    "droppexd.catalog.batch": {"EXTENTS_AT_ONCE": 2},
    "droppexd.wire.rpc": {"MOST_STALE_TIMERS": 64},
}
"""What is replaced where. A name that is gone is an error here: the scale must follow the code."""


def _drawn(module_name: str, most_transfers: int) -> dict[str, int]:
    return {"_MOST_STREAMS": most_transfers} if module_name == "droppexd.roles.app" else {}


@contextmanager
def small_scale(most_transfers: int) -> Iterator[None]:
    """Run a block with the small bounds, and so many open transfers of each direction at an app."""
    before = []
    try:
        for module_name, names in _SCALED.items():
            module = import_module(module_name)
            for name, value in {**names, **_drawn(module_name, most_transfers)}.items():
                before.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)
