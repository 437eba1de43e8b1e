"""Where a catalogue is, as a person writes it: `sqlite:FILE`, or `etcd:URL[,URL]...[/PREFIX/]`."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from droppexd.catalog.engine import Engine
from droppexd.errors import CatalogError, ConfigError
from droppexd.runtime import Runtime

DEFAULT_PREFIX = "droppex/"
_BUSY_S = 15.0
"""For longer than a lease nobody gets the mandate of a running controller."""


class Place(NamedTuple):
    """A file of SQLite, or the members of an etcd and a prefix there."""

    file: Path | None
    endpoints: tuple[str, ...] = ()
    prefix: str = DEFAULT_PREFIX


def parse_place(text: str) -> Place:
    """Return the place. Raise ConfigError."""
    kind, _, rest = text.partition(":")
    if kind == "sqlite" and rest:
        return Place(Path(rest))
    if kind == "etcd" and rest:
        *first, last = rest.split(",")
        scheme, separator, tail = last.partition("://")
        host, slash, prefix = tail.partition("/")
        endpoints = (*(one.rstrip("/") for one in first), f"{scheme}{separator}{host}")
        if all(one.startswith(("http://", "https://")) and ":" in one[8:] for one in endpoints):
            return Place(None, endpoints, prefix if slash and prefix else DEFAULT_PREFIX)
    raise ConfigError(
        [
            f"{text!r} is no place of a catalogue: sqlite:FILE, or etcd:https://HOST:PORT,https://HOST:PORT/PREFIX/"
        ]
    )


@asynccontextmanager
async def open_place(
    place: Place, runtime: Runtime, tls_files: tuple[str, str, str], *, must_exist: bool = False
) -> AsyncIterator[Engine]:
    """Open the engine there, for this process alone.

    Raise IdentityError or CatalogError when it is in use.
    """
    if place.file is not None:
        from droppexd.catalog.sqlite import open_sqlite_engine

        if must_exist and not place.file.is_file():
            raise CatalogError(f"there is no catalogue {place.file}")
        async with open_sqlite_engine(place.file, runtime) as engine:
            yield engine
        return
    from droppexd.catalog.etcd_client import tls_context
    from droppexd.catalog.etcd_group import EtcdSettings, open_etcd_group

    secure = any(endpoint.startswith("https:") for endpoint in place.endpoints)
    tls = tls_context(*tls_files) if secure else None
    settings = EtcdSettings(endpoints=place.endpoints, prefix=place.prefix)
    async with open_etcd_group(settings, runtime, tls) as group:
        with trio.CancelScope(deadline=trio.current_time() + _BUSY_S) as waiting:
            async with group.campaign("droppexd-catalog") as mandate:
                waiting.deadline = math.inf
                yield mandate.engine
        if waiting.cancelled_caught:
            busy = f"the controller {group.master} runs on it" if group.master else group.health.failure
            raise CatalogError(f"the catalogue in etcd cannot be had: {busy or 'it is in use'}")
