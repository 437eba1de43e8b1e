"""What a check came to."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """It works, and something may come of it."""
    ERROR = "error"
    """Something does not work, or will be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One line of a report, and for what is not ok one line of what to do."""

    check: str
    level: Level
    text: str
    subject: str = ""
    """What it is about, for programs: a folder, a file, an address, or the name of a peer."""
    advice: str = ""


def ok(check: str, text: str, *, subject: str = "") -> Verdict:
    """Return that all is well."""
    return Verdict(check=check, level=Level.OK, text=text, subject=subject)


def warning(check: str, text: str, advice: str, *, subject: str = "") -> Verdict:
    """Return that something may come of it."""
    return Verdict(check=check, level=Level.WARNING, text=text, subject=subject, advice=advice)


def error(check: str, text: str, advice: str, *, subject: str = "") -> Verdict:
    """Return that something does not work."""
    return Verdict(check=check, level=Level.ERROR, text=text, subject=subject, advice=advice)


def worst(verdicts: Iterable[Verdict]) -> Level:
    """Return the worst level of all; OK when there are none."""
    levels = {verdict.level for verdict in verdicts}
    return next((level for level in (Level.ERROR, Level.WARNING) if level in levels), Level.OK)
