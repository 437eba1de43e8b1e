"""Where controllers may be found besides at the addresses that were given: behind names, and in the bucket.

Asked when no controller answers that is known. What a source says is only where to ask: who answers there is
proven by its key and its term.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import trio

from droppexd.bucket import READ_S, BucketError, Whereabouts, read_file, read_url, sign, verify, write_file
from droppexd.runtime import Runtime

log = logging.getLogger("droppex.finding")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the numeric addresses of a host name, for a port; raises OSError."""

_RESOLVE_S = 5.0


async def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a host."""
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Bucket:
    """The signed document at one place, for one cluster."""

    def __init__(self, url: str, public: bytes, runtime: Runtime, secret: bytes = b"") -> None:
        self.url = url
        self._public = public
        self._secret = secret
        self._runtime = runtime
        self._path = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None

    async def read(self, term: int, cluster_id: bytes = b"") -> Whereabouts:
        """Return what it says. Raise BucketError when it is not to be believed.

        `term` is the highest that was seen, and `cluster_id` the own cluster's, where that is known.
        """
        document: bytes | None = None
        with trio.move_on_after(READ_S):
            if self._path is not None:
                document = await self._runtime.run_blocking(read_file, self._path)
            else:
                document = await read_url(self.url)
        if document is None:
            raise BucketError("it cannot be read in time")
        told = verify(document, self._public)
        if cluster_id and told.cluster_id != cluster_id:
            raise BucketError(f"it is of another cluster, {told.cluster_id.hex()}")
        if told.term < term:
            raise BucketError(f"it is of term {told.term}, and there has been a master of term {term}")
        return told

    async def publish(self, told: Whereabouts) -> None:
        """Write it, where it is a file and this process has the key. What fails is logged."""
        if self._path is None or not self._secret:
            return
        try:
            document = sign(told, self._secret)
            await self._runtime.run_blocking(write_file, self._path, document)
        except BucketError as error:
            log.warning("the bucket %s is not up to date: %s", self.url, error)


class Finder:
    """Looks for controllers in every source, in order."""

    def __init__(
        self, seeds: Sequence[str], bucket: Bucket | None = None, resolve_host: Resolve = resolve
    ) -> None:
        self._seeds = tuple(seeds)
        self._bucket = bucket
        self._resolve = resolve_host
        self._complaints: dict[str, str] = {}

    async def find(self, term: int, cluster_id: bytes = b"") -> tuple[str, ...]:
        """Return addresses that may be controllers': of host names with several, and of the bucket."""
        found: list[str] = []
        for seed in self._seeds:
            found += await self._behind(seed)
        if self._bucket is not None:
            try:
                told = await self._bucket.read(term, cluster_id)
            except BucketError as error:
                self._complain(f"the bucket {self._bucket.url}", str(error))
            else:
                self._complaints.pop(f"the bucket {self._bucket.url}", None)
                found += [told.master, *told.controllers]
        return tuple(dict.fromkeys(found))

    async def _behind(self, seed: str) -> list[str]:
        """Return the addresses behind a name; none when it is an address itself."""
        host, _, port = seed.removeprefix("tcp://").rpartition(":")
        if host.startswith("[") or host.replace(".", "").isdigit():
            return []
        addresses: Sequence[str] | None = None
        reason = "it is not resolved in time"
        with trio.move_on_after(_RESOLVE_S):
            try:
                addresses = await self._resolve(host, int(port))
            except (OSError, UnicodeError) as error:  # The latter for `a..b` and for labels over 63 letters.
                reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        if addresses is None:
            self._complain(host, reason)
            return []
        self._complaints.pop(host, None)
        return [f"tcp://[{one}]:{port}" if ":" in one else f"tcp://{one}:{port}" for one in addresses]

    def _complain(self, source: str, reason: str) -> None:
        """Log why a source is of no use, once for each reason."""
        if self._complaints.get(source) != reason:
            self._complaints[source] = reason
            log.warning("%s does not tell where the controllers are: %s", source, reason)
