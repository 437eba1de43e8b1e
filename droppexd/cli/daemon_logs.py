"""Logs for people and machines alike: one line an event, in logfmt, on standard error.

Where standard error is systemd's journal, events go there in its own format instead, each field by itself:
`journalctl DROPPEX_POOL=3` finds what is about one pool.
"""

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

_FIELDS = re.compile(r"(?:^| )[a-z_]+=\S+(?: [a-z_]+=\S+)*$")
"""Key=value pairs at the end of a message, as `pool ready name=p1 address=...` has them."""

JOURNAL_SOCKET = "/run/systemd/journal/socket"

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Of syslog."""

_PLAIN = re.compile(r"[^\s\"=\\]+")


class LogfmtFormatter(logging.Formatter):
    """`time=... level=info from=pool msg="ready" name=p1`. Whatever a message contains, it stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        text, fields = _split(record.getMessage())
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        parts = [
            f"time={time.replace('+00:00', 'Z')}",
            f"level={record.levelname.lower()}",
            f"from={record.name.removeprefix('droppexd.').removeprefix('droppex.')}",
            f"msg={_quoted(text)}",
        ]
        if fields:
            parts.append(fields)
        if record.exc_info:
            parts.append(f"trace={_quoted(self.formatException(record.exc_info))}")
        return " ".join(parts)


def _split(message: str) -> tuple[str, str]:
    """Return the text of a message, and the fields at its end."""
    match = _FIELDS.search(message) if message.isprintable() else None
    return (message[: match.start()], match[0].strip()) if match else (message, "")


class JournalHandler(logging.Handler):
    """Sends events to systemd's journal, with their fields.

    The protocol is https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a datagram of fields.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.connect(address)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; what the journal does not take goes to standard error."""
        try:
            self._socket.send(self._packed(record))
        except OSError:
            print(LogfmtFormatter().format(record), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()

    def _packed(self, record: logging.LogRecord) -> bytes:
        message = record.getMessage()
        values = {
            "MESSAGE": message,
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": "droppexd",
            "DROPPEX_FROM": record.name.removeprefix("droppexd.").removeprefix("droppex."),
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        for field in _split(message)[1].split():
            name, _, value = field.partition("=")
            values[f"DROPPEX_{name.upper()}"] = value
        if record.exc_info:
            values["DROPPEX_TRACE"] = logging.Formatter().formatException(record.exc_info)
        return b"".join(_field(name, value) for name, value in values.items())


def _field(name: str, value: str) -> bytes:
    """Return a field as the journal takes it: with its length where it has several lines."""
    raw = value.encode(errors="replace")
    if b"\n" not in raw:
        return name.encode() + b"=" + raw + b"\n"
    return name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"


def journal_handler(environment: Mapping[str, str]) -> logging.Handler | None:
    """Return a handler for systemd's journal where that is what standard error leads to, else None."""
    try:
        state = os.fstat(sys.stderr.fileno())
        if environment.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}":
            return JournalHandler(JOURNAL_SOCKET)
    except (OSError, ValueError):
        pass
    return None


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text, ensure_ascii=False)


def set_up_logs(level: str, stream: TextIO | None = None, *, journal: logging.Handler | None = None) -> None:
    """Send the logs of droppex to standard error, from `level` on; those of libraries from warnings on.

    With `journal` they go there.
    """
    handler = journal or logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("droppex", "droppexd"):
        logging.getLogger(name).setLevel(level.upper())
