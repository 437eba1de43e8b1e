"""Join tokens: one line of text with which a machine becomes a member.

A token is a key pair that controllers let in for one request, to be made a member. The line holds its secret,
the cluster's public key, by which a machine knows that it talks to its cluster, and where controllers are.
"""

import base64
import binascii
import zlib
from typing import Annotated

import msgpack

from droppexd.errors import ConfigError, RemoteProtocolError
from droppexd.model import MAX_MEMBER_ROLES, MEMBER_ROLES, ControllerAddresses, Label, PublicKey
from droppexd.schema import Bounds, pack, record, unpack

PREFIX = "droppex1-"
"""What each token begins with; another number would be another format."""

_MOST_TEXT = 8192
_CHECK_BYTES = 4


@record
class Token:
    """What a join token says."""

    secret: PublicKey
    cluster_public: PublicKey
    controllers: ControllerAddresses
    roles: Annotated[tuple[Label, ...], Bounds(1, MAX_MEMBER_ROLES)]

    def __repr__(self) -> str:
        return f"Token({', '.join(self.roles)})"


def format_token(token: Token) -> str:
    """Return the line for a token."""
    packed: bytes = msgpack.packb(pack(token))
    check = zlib.crc32(packed).to_bytes(_CHECK_BYTES)
    return PREFIX + base64.urlsafe_b64encode(packed + check).decode().rstrip("=")


def parse_token(text: str) -> Token:
    """Return what a line says; raise ConfigError when it is no token, or not a whole one."""
    text = "".join(text.split())
    if not text.startswith(PREFIX) or len(text) > _MOST_TEXT:
        raise ConfigError(
            [f"this is no join token: it begins with {PREFIX} (`droppexd join-token` prints one)"]
        )
    body = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        packed, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if zlib.crc32(packed).to_bytes(_CHECK_BYTES) != check:
            raise ValueError("checksum")
        token = unpack(Token, msgpack.unpackb(packed))
        if not set(token.roles) <= set(MEMBER_ROLES) or not token.controllers:
            raise ValueError("roles")
    except (ValueError, RemoteProtocolError, binascii.Error, msgpack.UnpackException) as error:
        raise ConfigError(["this join token is damaged: copy the whole line"]) from error
    return token
