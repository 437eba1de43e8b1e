"""Every error that droppex raises on purpose: when it is raised, and what to do about it.

An error that crosses the wire is sent as its `code`, its message and a few strings of detail, and is
raised again as the same class on the other side (`droppexd.wire.messages.Failed`).
"""

from collections.abc import Sequence
from typing import ClassVar


class DroppexError(Exception):
    """Anything that droppex raises on purpose. The text is one clear line for a person."""

    code: ClassVar[str] = "error"

    @property
    def details(self) -> tuple[str, ...]:
        """Short strings that travel with the error beside its text."""
        return ()


class ConfigError(DroppexError):
    """Options or files are wrong. The operator mends them; all problems are told at once."""

    code = "config"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class InvalidName(DroppexError):
    """A file name breaks the rules. Choose another name."""

    code = "invalid-name"


class InvalidRequest(DroppexError):
    """A well-formed request asks for something that cannot be. Mend the request."""

    code = "invalid-request"


class StreamGone(InvalidRequest):
    """An app does not know this transfer: it was started anew, or heard nothing too long. Begin again."""

    code = "stream-gone"


class LocalProtocolError(DroppexError):
    """Our own code was about to break the protocol: a bug here."""

    code = "local-protocol"


class RemoteProtocolError(DroppexError):
    """A peer sent something that breaks the protocol. Refuse it; never crash."""

    code = "remote-protocol"


class VersionMismatch(RemoteProtocolError):
    """A peer's version of the protocol is no neighbour of ours. Upgrade the older side first."""

    code = "version-mismatch"


class UnknownKind(RemoteProtocolError):
    """A message is of a kind that its receiver has never heard of. Upgrade the older side."""

    code = "unknown-kind"


class PeerError(DroppexError):
    """A peer is unreachable, busy or refused. Try another, or the same one later."""

    code = "peer"


class PeerTimeout(PeerError):
    """A peer did not answer in time. Its connection is closed so that nothing stale is delivered."""

    code = "timeout"


class PeerBusy(PeerError):
    """A peer has as much outstanding work as it accepts. Try again later."""

    code = "busy"


class KeyRefused(PeerError):
    """A peer does not let this process's key in: it is no member's, or the token was used. Join anew."""

    code = "key-refused"


class NotAuthorised(PeerError):
    """The caller's key has a role that may not send this request. Use the right key."""

    code = "not-authorised"


class IntegrityError(DroppexError):
    """Stored or received bytes differ from their checksum. Never retry that copy; repair it."""

    code = "integrity"


class NotEnoughShards(DroppexError):
    """Fewer than k shards of an extent can be read now, or fewer than k+1 can be written."""

    code = "not-enough-shards"

    def __init__(self, message: str, missing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)

    @property
    def details(self) -> tuple[str, ...]:
        """What is missing, one string a shard."""
        return self.missing


class ClusterFull(NotEnoughShards):
    """Too few pools have room for a write that survives a loss. Delete files or add a pool."""

    code = "cluster-full"


class NotFound(DroppexError):
    """No file has this name. Look at `droppex ls`."""

    code = "not-found"


class Conflict(DroppexError):
    """A condition did not hold: the name exists, or has another version by now."""

    code = "conflict"


class StaleRead(DroppexError):
    """A version went away while it was read. Look the name up again."""

    code = "stale-read"


class NoSuchShard(DroppexError):
    """A pool does not hold this shard. Look the version up again, or rebuild the shard."""

    code = "no-such-shard"


class StoreError(DroppexError):
    """This disk failed or refused. The pool stays up and says so; use another pool."""

    code = "store"


class StoreFull(StoreError):
    """This disk is full. Delete files or add a pool."""

    code = "store-full"


class CatalogError(DroppexError):
    """The catalogue cannot be opened, read or written. It refuses to guess; restore it."""

    code = "catalog"


class CatalogFull(CatalogError):
    """The disk of the catalogue is full, and nothing was changed. Make room on it: it goes on by itself."""

    code = "catalog-full"


class SessionClosed(DroppexError):
    """The app's session with the master is over. Open a new one; what was under way is lost."""

    code = "session-closed"


class IdentityError(DroppexError):
    """A data folder or peer belongs to another pool or cluster, or is in use twice."""

    code = "identity"


class NotMaster(DroppexError):
    """The controller asked is not the master. `address` names the master when it is known."""

    code = "not-master"

    def __init__(self, message: str, address: str = "") -> None:
        super().__init__(message)
        self.address = address

    @property
    def details(self) -> tuple[str, ...]:
        """The master's address, when known."""
        return (self.address,) if self.address else ()


def _all_classes(base: type[DroppexError]) -> dict[str, type[DroppexError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found.update(_all_classes(child))
    return found


_BY_CODE = _all_classes(DroppexError)


def from_wire(code: str, message: str, details: Sequence[str]) -> DroppexError:
    """Return the error that a peer reported, as the class it had there."""
    error_class = _BY_CODE.get(code, DroppexError)
    if issubclass(error_class, NotEnoughShards):
        return error_class(message, details)
    if error_class is NotMaster:
        return NotMaster(message, details[0] if details else "")
    if error_class is ConfigError:
        return ConfigError([message])
    return error_class(message)
