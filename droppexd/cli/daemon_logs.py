"""Logs for people and machines alike: one line an event, in logfmt, on standard error."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import TextIO

_FIELDS = re.compile(r"(?:^| )[a-z_]+=\S+(?: [a-z_]+=\S+)*$")
"""Key=value pairs at the end of a message, as `pool ready name=p1 address=...` has them."""

_PLAIN = re.compile(r"[^\s\"=\\]+")


class LogfmtFormatter(logging.Formatter):
    """`time=... level=info from=pool msg="ready" name=p1`. Whatever a message contains, it stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        text = record.getMessage()
        match = _FIELDS.search(text) if text.isprintable() else None
        fields = match[0].strip() if match else ""
        if match:
            text = text[: match.start()]
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


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text, ensure_ascii=False)


def set_up_logs(level: str, stream: TextIO | None = None) -> None:
    """Send the logs of droppex to standard error, from `level` on; those of libraries from warnings on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("droppex", "droppexd"):
        logging.getLogger(name).setLevel(level.upper())
