"""A small client of etcd's v3 JSON gateway: what the catalogue needs, and nothing else.

Questions go to one endpoint until that fails, then to the next. A question is put again when its answer is
lost: who asks for a change makes it so that it is carried out once at most.
"""

import json
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from droppexd.errors import CatalogError, ConfigError

Json = dict[str, Any]

ATTEMPT_S = 3.0
"""One endpoint gets this long for an answer before the next is asked."""
_CONNECT_S = 1.0
_PAUSE_S = 0.05
MAX_ANSWER_BYTES = 64 * 1024 * 1024

_UNAVAILABLE = frozenset((4, 14))
"""gRPC's codes for: too late, and not available (no leader, a leader that changed, a member that starts)."""
_EXHAUSTED = 8
_OUT_OF_RANGE = 11


class EtcdRefused(CatalogError):
    """etcd answered that it cannot do this; no other endpoint would answer otherwise. `code` is gRPC's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.grpc_code = code


class EtcdUnavailable(CatalogError):
    """No endpoint answered in time. Whether a change was carried out is unknown."""


class EtcdCompacted(CatalogError):
    """What was asked for is older than what etcd keeps."""


def encode(data: bytes) -> str:
    """Return bytes as the gateway takes them."""
    return b64encode(data).decode("ascii")


def decode(text: str) -> bytes:
    """Return bytes that the gateway gave."""
    return b64decode(text)


def tls_context(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """Return how etcd is recognised, and how this client proves itself. Raise ConfigError."""
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert:
            context.load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(Path(file)) for file in (ca, cert, key) if file)
        raise ConfigError([f"the TLS files for etcd ({files}) cannot be used: {error}"]) from error
    return context


class EtcdClient:
    """Asks etcd. Made by `open_etcd_client`."""

    def __init__(self, endpoints: Sequence[str], http: httpx.AsyncClient) -> None:
        self.endpoints = tuple(endpoints)
        self._http = http
        self._current = 0

    async def ask(self, path: str, question: Json, *, timeout_s: float, endpoint: str = "") -> Json:
        """Return etcd's answer. The question may be put several times, to one endpoint after another.

        Raise EtcdRefused, EtcdCompacted, and EtcdUnavailable when the time is over.
        """
        deadline = trio.current_time() + timeout_s
        content = json.dumps(question, separators=(",", ":")).encode()
        failure = "no time was left"
        asked = 0
        while True:
            remaining_s = deadline - trio.current_time()
            if remaining_s <= 0:
                raise EtcdUnavailable(f"etcd does not answer: {failure}")
            current = endpoint or self.endpoints[self._current]
            with trio.move_on_after(min(remaining_s, ATTEMPT_S)) as attempt:
                try:
                    return await self._post(current + path, content)
                except _TryElsewhere as error:
                    failure = str(error)
            if attempt.cancelled_caught:
                failure = f"{current} is silent"
            if not endpoint and current == self.endpoints[self._current]:
                self._current = (self._current + 1) % len(self.endpoints)
            asked += 1
            if asked % len(self.endpoints) == 0:
                await trio.sleep(min(_PAUSE_S * asked, 0.5))

    async def _post(self, url: str, content: bytes) -> Json:
        try:
            response = await self._http.post(url, content=content)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _TryElsewhere(f"{url.partition('/v3/')[0]}: {_told(error)}") from error
        return _answer(url, response.status_code, response.content)

    async def follow(self, path: str, question: Json, take: Callable[[Json], bool]) -> None:
        """Hand on the parts of an answer that has no end, until `take` returns False.

        Raise EtcdUnavailable when it breaks off before.
        """
        url = self.endpoints[self._current] + path
        going_on = True
        failure: Exception | None = None
        # The end is a cancellation: it goes through all the generators that read the answer, and ends each.
        with trio.CancelScope() as scope:
            try:
                async with self._http.stream("POST", url, json=question) as response:
                    async for line in response.aiter_lines():
                        if not going_on or not line:
                            continue
                        try:
                            going_on = take(_answer(url, response.status_code, line.encode()))
                        except (CatalogError, _TryElsewhere, KeyError, ValueError, TypeError) as error:
                            going_on, failure = False, error
                        if not going_on:
                            scope.cancel()
            except httpx.TransportError as error:
                failure = error
        if isinstance(failure, CatalogError):
            raise failure
        if going_on or failure is not None:
            told = f": {_told(failure)}" if failure is not None else ""
            raise EtcdUnavailable(f"etcd broke off{told}") from failure


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


class _TryElsewhere(Exception):
    """This endpoint cannot answer now."""


def _answer(url: str, status: int, content: bytes) -> Json:
    where = url.partition("/v3/")[0]
    if len(content) > MAX_ANSWER_BYTES:
        raise CatalogError(f"{where} answered with {len(content)} bytes, more than was asked for")
    try:
        answer = json.loads(content)
    except ValueError:
        raise _TryElsewhere(f"{where} does not answer as etcd does") from None
    if not isinstance(answer, dict):
        raise _TryElsewhere(f"{where} does not answer as etcd does")
    if isinstance(answer.get("error"), dict):  # Within a stream.
        answer = answer["error"]
        status = 400
    elif status == httpx.codes.OK:
        if not answer.keys() & {"header", "result"}:
            raise _TryElsewhere(f"{where} does not answer as etcd does")
        return answer
    code = answer.get("code", answer.get("grpc_code", 2))
    told = str(answer.get("message") or answer.get("error") or status)[:300]
    if code in _UNAVAILABLE or "leader" in told:
        raise _TryElsewhere(f"{where}: {told}")
    if code == _OUT_OF_RANGE and "compacted" in told:
        raise EtcdCompacted(told)
    if code == _EXHAUSTED:
        told += "; make room in etcd, see docs/operations/set-up-etcd.md"
    raise EtcdRefused(f"etcd at {where} refuses: {told}", code)


@asynccontextmanager
async def open_etcd_client(
    endpoints: Sequence[str], tls: ssl.SSLContext | None = None
) -> AsyncIterator[EtcdClient]:
    """Open connections to etcd as they are needed; close them in the end."""
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=16)
    secure = any(endpoint.startswith("https:") for endpoint in endpoints)
    verify: ssl.SSLContext | bool = tls or (tls_context("", "", "") if secure else False)
    # Nothing of the environment counts: a proxy for the web is not for etcd.
    async with httpx.AsyncClient(timeout=timeout, limits=limits, verify=verify, trust_env=False) as http:
        yield EtcdClient(endpoints, http)
