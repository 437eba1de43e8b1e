"""Where roles listen: whether the address is theirs, free, or somebody else's."""

import errno
import socket
from typing import NamedTuple

from droppexd.doctor.verdicts import Verdict, error, ok, warning
from droppexd.errors import KeyRefused
from droppexd.model import Role
from droppexd.wire.examining import ANOTHER
from droppexd.wire.group_messages import PeerReport


class Listening(NamedTuple):
    """What was seen of an address where a role of this machine is to listen."""

    role: Role
    address: str
    report: PeerReport | None
    """Of the role that answers there; None when nobody was asked."""
    bind_error: int
    """Why nobody can listen there now, as an errno; 0: it is free."""
    advertised: PeerReport | None = None
    """Of who answers where others are told that the role is, when that is elsewhere."""


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `tcp://HOST:PORT`; the host is empty for every interface."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    return "" if host == "*" else host, int(port)


def try_to_bind(address: str) -> int:
    """Return why nobody can listen at an address, as an errno; 0 when somebody can. Blocking.

    It is bound for a moment, and nothing listens there.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as failure:
        # Of a host name that nobody knows, the errno is none of the system's.
        known = failure.errno is not None and failure.errno > 0
        return failure.errno if known and failure.errno is not None else errno.EADDRNOTAVAIL
    return 0


def reached_at(address: str) -> str:
    """Return where this machine reaches what listens at an address."""
    host, port = split_address(address)
    if host in ("", "0.0.0.0"):  # noqa: S104  It is compared, and nothing is bound.
        return f"tcp://127.0.0.1:{port}"
    return f"tcp://[::1]:{port}" if host == "::" else address


def judge_listening(listening: Listening) -> Verdict:
    """Say whether a role listens, or can listen, where it is to."""
    role, address, report, bind_error, advertised = listening
    where = f"{address} ({role})"
    if split_address(address)[1] == 0:
        return ok("ports", f"the {role} takes any port that is free", subject=address)
    if report is not None and not report.code:
        if advertised is not None and advertised.code:
            text = f"others are told that the {role} is at {advertised.address}: {advertised.failure}"
            advice = f"set `advertise` in [{role}] to where they reach it; not all networks let a machine try"
            return warning("ports", text, advice, subject=advertised.address)
        return ok("ports", f"{where} is held by the {role} {report.name}, which answers", subject=address)
    if report is not None and report.code == KeyRefused.code:
        text = f"{where} is held by a droppexd that does not let this key in"
        return warning("ports", text, "`droppex members` shows whose keys are let in", subject=address)
    if report is not None and report.code == ANOTHER:
        return error("ports", report.failure, f"give the {role} another address", subject=address)
    if not bind_error:
        return ok("ports", f"{where} is free: the {role} is not running", subject=address)
    if bind_error == errno.EADDRINUSE and report is None:
        text = f"{where} is in use; by whom cannot be asked without keys"
        return warning("ports", text, "mend the keys first, and run this again", subject=address)
    if bind_error == errno.EADDRINUSE:
        said = f": {report.failure}" if report is not None else ""
        return error(
            "ports",
            f"{where} is in use by something that does not answer as a {role} of this cluster{said}",
            f"`ss -ltnp` shows what it is: stop that, or give the {role} another address",
            subject=address,
        )
    if bind_error == errno.EADDRNOTAVAIL:
        text = f"{where} is no address of this machine"
        advice = f"`ip address` shows what it has: set `listen` in [{role}]"
        return error("ports", text, advice, subject=address)
    text = f"nobody can listen at {where}: {_reason(bind_error)}"
    return error("ports", text, f"give the {role} another address", subject=address)


def _reason(number: int) -> str:
    if number == errno.EACCES:
        return "ports below 1024 are root's"
    return errno.errorcode.get(number, str(number))
