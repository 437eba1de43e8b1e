"""The bucket: a small signed document that says where the controllers are, in a shared file or at a URL.

Pools and apps that find no master at the addresses they know read it. A controller with the signing key
writes it whenever it becomes the master, where it is a file. The signature (Ed25519, RFC 8032) is over the
text that it stands beside, byte by byte, so that nothing depends on how JSON is written.
"""

import json
import os
import re
import stat
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from droppexd.errors import ConfigError, DroppexError
from droppexd.folders import flush_folder
from droppexd.model import MAX_CONTROLLERS

MAX_BYTES = 64 * 1024
READ_S = 5.0
KEY_BYTES = 32

_FORMAT = 1
_ID_BYTES = 16
_MAX_ADDRESS = 256
_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")

_NONE_SUCH = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What JSON of another shape leads to: RecursionError is for many brackets, OverflowError for Infinity."""


class BucketError(DroppexError):
    """The document cannot be read, or is not to be believed. Other ways to the controllers go on."""

    code = "bucket"


class Whereabouts(NamedTuple):
    """What the document says."""

    cluster_id: bytes
    term: int
    master: str
    controllers: tuple[str, ...]
    written_ms: int = 0
    """For people."""


def sign(told: Whereabouts, secret: bytes) -> bytes:
    """Return the signed document."""
    from nacl.signing import SigningKey

    written = datetime.fromtimestamp(told.written_ms / 1000, UTC).isoformat(timespec="seconds")
    text = json.dumps(
        {
            "format": _FORMAT,
            "cluster_id": told.cluster_id.hex(),
            "term": told.term,
            "master": told.master,
            "controllers": list(told.controllers),
            "written_ms": told.written_ms,
            "written": written,
        }
    )
    signature = SigningKey(secret).sign(text.encode()).signature
    return (json.dumps({"says": text, "signature": signature.hex()}, indent=2) + "\n").encode()


def verify(document: bytes, public: bytes) -> Whereabouts:
    """Return what a document says that was signed by this key. Raise BucketError."""
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    if len(document) > MAX_BYTES:
        raise BucketError(f"the document has more than {MAX_BYTES // 1024} KiB")
    try:
        outer = json.loads(document)
        text, signature = outer["says"], bytes.fromhex(outer["signature"])
        VerifyKey(public).verify(text.encode(), signature)
    except BadSignatureError as error:
        raise BucketError("the signature is wrong") from error
    except _NONE_SUCH as error:
        raise BucketError("it is no such document") from error
    try:
        return _parsed(json.loads(text))
    except _NONE_SUCH as error:
        raise BucketError(f"what was signed is not understood: {error}") from error


def _parsed(fields: dict[str, Any]) -> Whereabouts:
    if fields["format"] != _FORMAT:
        raise ValueError(f"format {fields['format']!r}")
    cluster_id, term, controllers = bytes.fromhex(fields["cluster_id"]), fields["term"], fields["controllers"]
    addresses = (fields["master"], *controllers)
    if (
        len(cluster_id) != _ID_BYTES
        or type(term) is not int
        or term < 0
        or len(controllers) > MAX_CONTROLLERS
    ):
        raise ValueError("a cluster, a term or a list that cannot be")
    if not all(map(_is_address, addresses)):
        raise ValueError("an address that is none")
    return Whereabouts(cluster_id, term, fields["master"], tuple(controllers), int(fields["written_ms"]))


def _is_address(value: object) -> bool:
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) and len(value) <= _MAX_ADDRESS else None
    return match is not None and 0 < int(match[2]) <= 65535


# -- keys ------------------------------------------------------------------------------------------


def make_signing_key(path: Path) -> str:
    """Make a signing key in a new file, readable by its owner alone; return the public key. Blocking."""
    from nacl.signing import SigningKey

    key = SigningKey.generate()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(bytes(key).hex() + "\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise ConfigError([f"cannot write {path}: {error.strerror}"]) from error
    return bytes(key.verify_key).hex()


def read_signing_key(path: Path, public: bytes) -> bytes:
    """Return the secret of the signing key that this public key belongs to. Blocking. Raise ConfigError."""
    from nacl.signing import SigningKey

    try:
        mode = path.stat().st_mode
        text = path.read_text("ascii")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no key"
        raise ConfigError([f"cannot read the signing key {path}: {reason}"]) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError([f"{path} is open to others (mode {stat.S_IMODE(mode):o}): chmod 600 it"])
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise ConfigError([f"{path} is no signing key of `droppexd bucket-key`"])
    own = bytes(SigningKey(secret).verify_key)
    if own != public:
        reason = f"nobody would believe what {path} signs: its public key is {own.hex()}, not bucket_key"
        raise ConfigError([reason])
    return secret


# -- where it is -----------------------------------------------------------------------------------


def read_file(path: Path) -> bytes:
    """Return the document in a file. Blocking. Raise BucketError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BucketError(f"{path}: {error.strerror}") from error


def write_file(path: Path, document: bytes) -> None:
    """Replace the document in a file: the old or the new one is there at any moment. Blocking."""
    # Masters on several machines may write at once, and in containers they all have the same process id.
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with new.open("xb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise BucketError(f"{path} cannot be written: {error.strerror}") from error


async def read_url(url: str) -> bytes:
    """Return the document at a URL, as it is stored there. Raise BucketError. No redirection is followed.

    The certificate is checked against the public authorities, or those of the file in SSL_CERT_FILE.
    """
    import httpx

    # Compressed, a small answer could become a large one.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}

    try:
        async with (
            httpx.AsyncClient(timeout=READ_S) as http,
            http.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise BucketError(f"{url} answers with {response.status_code}")
            if int(response.headers.get("Content-Length", "0") or 0) > MAX_BYTES:
                raise BucketError(f"{url} has more than {MAX_BYTES // 1024} KiB")
            content = b""
            async for part in response.aiter_raw():  # To its end: httpx leaves generators behind otherwise.
                if len(content) <= MAX_BYTES:
                    content += part
            return content
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise BucketError(f"{url}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the first text in a chain of errors: httpx hides what is wrong with a certificate."""
    one: BaseException | None = error
    while one is not None:
        text = one.strerror if isinstance(one, OSError) and one.strerror else str(one)
        if text:
            return text
        one = one.__cause__ or one.__context__
    return type(error).__name__
