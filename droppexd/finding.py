"""Where controllers may be found besides at the addresses that were given: behind names, and in the bucket.

Asked when no controller answers that is known. What a source says is only where to ask: who answers there is
proven by its key and its term.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import trio

from droppexd.bucket import (
    BucketError,
    Whereabouts,
    read_file,
    read_url,
    sign,
    verify,
    write_file,
)
from droppexd.runtime import RunBlocking

log = logging.getLogger("droppex.finding")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the numeric addresses of a host name, for a port; raises OSError."""

ASK_S = 5.0
"""A source that has told nothing in this time is of no use for now."""

GRACE_S = 1.0
"""The same, once another source has told something."""

WRITE_S = 10.0


async def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a host."""
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Complaints:
    """Why something is of no use, so that it is logged once for each reason."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def is_new(self, what: str, reason: str) -> bool:
        """Say whether this is another reason than before, and keep it."""
        former, self._reasons[what] = self._reasons.get(what), reason
        return former != reason

    def drop(self, what: str) -> bool:
        """Forget the reason; say whether there was one."""
        return self._reasons.pop(what, None) is not None


class Bucket:
    """The signed document at one place, for one cluster.

    `run_blocking` leaves a call behind that is cancelled: files on a share may hang.
    """

    def __init__(self, url: str, public: bytes, run_blocking: RunBlocking, secret: bytes = b"") -> None:
        self.url = url
        self._public = public
        self._secret = secret
        self._run_blocking = run_blocking
        self._path = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None
        self._seen = Whereabouts(b"", 0, "", ())
        self._complaints = _Complaints()

    async def read(self, term: int, cluster_id: bytes = b"") -> Whereabouts:
        """Return what it says. Raise BucketError when it is not to be believed. The caller owns the time.

        `term` is the highest that was seen, and `cluster_id` the own cluster's, where that is known.
        """
        if self._path is not None:
            document = await self._run_blocking(read_file, self._path)
        else:
            document = await read_url(self.url)
        told = verify(document, self._public)
        if cluster_id and told.cluster_id != cluster_id:
            raise BucketError(f"it is of another cluster, {told.cluster_id.hex()}")
        if told.cluster_id == self._seen.cluster_id:
            term = max(term, self._seen.term)
        if told.term < term:
            raise BucketError(f"it is of term {told.term}, and there has been a master of term {term}")
        self._seen = told
        return told

    async def publish(self, told: Whereabouts) -> bool:
        """Write it, where it is a file and this process has the key; return False to be called again later.

        What fails, or takes longer than WRITE_S, is logged.
        """
        if self._path is None or not self._secret:
            return True
        reason = "it cannot be written in time"
        with trio.move_on_after(WRITE_S):
            try:
                await self._run_blocking(write_file, self._path, sign(told, self._secret))
            except BucketError as error:
                reason = str(error)
            else:
                if self._complaints.drop(self.url):
                    log.info("the bucket %s is up to date again", self.url)
                return True
        if self._complaints.is_new(self.url, reason):
            log.warning("the bucket %s is not up to date: %s", self.url, reason)
        return False


class _Source(NamedTuple):
    """Somewhere to ask where controllers are."""

    name: str
    ask: Callable[[], Awaitable[Sequence[str]]]


class Finder:
    """Looks for controllers in every source."""

    def __init__(
        self, seeds: Sequence[str], bucket: Bucket | None = None, resolve_host: Resolve = resolve
    ) -> None:
        self._seeds = tuple(seeds)
        self._bucket = bucket
        self._resolve = resolve_host
        self._complaints = _Complaints()

    async def find(self, term: int, cluster_id: bytes = b"") -> tuple[str, ...]:
        """Return addresses that may be controllers': of host names with several, and of the bucket.

        All sources are asked at once, so that one that is silent costs no other its time; what they tell is
        in the order of the configuration.
        """
        sources = self._sources(term, cluster_id)
        told: list[Sequence[str]] = [()] * len(sources)
        scopes = [trio.CancelScope(deadline=trio.current_time() + ASK_S) for _ in sources]

        async def ask(index: int) -> None:
            with scopes[index]:
                told[index] = await self._ask(sources[index])
            if scopes[index].cancelled_caught:
                self._complain(sources[index].name, "no answer in time")
            elif told[index]:
                for scope in scopes:
                    scope.deadline = min(scope.deadline, trio.current_time() + GRACE_S)

        async with trio.open_nursery() as nursery:
            for index in range(len(sources)):
                nursery.start_soon(ask, index)
        return tuple(dict.fromkeys(address for some in told for address in some))

    def _sources(self, term: int, cluster_id: bytes) -> list[_Source]:
        bucket, sources = self._bucket, []
        for seed in self._seeds:
            host, _, port = seed.removeprefix("tcp://").rpartition(":")
            if not (host.startswith("[") or host.replace(".", "").isdigit()):
                sources.append(_Source(host, partial(self._ask_name, host, port)))
        if bucket is not None:
            ask = partial(self._ask_bucket, bucket, term, cluster_id)
            sources.append(_Source(f"the bucket {bucket.url}", ask))
        return sources

    async def _ask(self, source: _Source) -> Sequence[str]:
        try:
            told = await source.ask()
        except BucketError as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        except UnicodeError as error:  # Of a name like `a..b`, or with a label of more than 63 letters.
            reason = str(error)
        else:
            self._complaints.drop(source.name)
            return told
        self._complain(source.name, reason)
        return ()

    async def _ask_name(self, host: str, port: str) -> Sequence[str]:
        addresses = await self._resolve(host, int(port))
        return [f"tcp://[{one}]:{port}" if ":" in one else f"tcp://{one}:{port}" for one in addresses]

    async def _ask_bucket(self, bucket: Bucket, term: int, cluster_id: bytes) -> Sequence[str]:
        told = await bucket.read(term, cluster_id)
        return (told.master, *told.controllers)

    def _complain(self, source: str, reason: str) -> None:
        if self._complaints.is_new(source, reason):
            log.warning("%s does not tell where the controllers are: %s", source, reason)
