"""How `droppex doctor` and `droppexd doctor` tell what they found."""

import logging
from collections.abc import Sequence

from droppexd.cli.exits import ExitCode, printable
from droppexd.cli.render import Document, Output, count_text, table
from droppexd.doctor.verdicts import Level, Verdict, worst


def silence_logs() -> None:
    """Let nobody else tell what a verdict tells: kernels and finders log what they miss."""
    logging.disable(logging.WARNING)


def report(output: Output, verdicts: Sequence[Verdict]) -> int:
    """Print verdicts and return the exit code."""
    if output.as_json:
        output.document(report_document(verdicts))
    else:
        for line in report_lines(verdicts, quiet=output.quiet):
            output.line(line)
    return ExitCode.FAILURE if worst(verdicts) == Level.ERROR else ExitCode.OK


def report_document(verdicts: Sequence[Verdict]) -> Document:
    """Return verdicts for programs."""
    return {
        "worst": worst(verdicts).value,
        "checks": [
            {
                "check": verdict.check,
                "level": verdict.level.value,
                "subject": verdict.subject or None,
                "text": verdict.text,
                "advice": verdict.advice or None,
            }
            for verdict in verdicts
        ],
    }


def report_lines(verdicts: Sequence[Verdict], *, quiet: bool = False) -> list[str]:
    """Return verdicts for people: a line each, one below it of what to do, and a line in the end.

    With `quiet` only those that are not ok.
    """
    rows: list[tuple[str, str, str]] = []
    for verdict in verdicts:
        if quiet and verdict.level == Level.OK:
            continue
        rows.append((verdict.level.value, verdict.check, _one_line(verdict.text)))
        if verdict.advice:
            rows.append(("", "", f"do: {_one_line(verdict.advice)}"))
    lines = table(rows)
    return lines if quiet else [*lines, _summary(verdicts)]


def _one_line(text: str) -> str:
    return printable("; ".join(text.splitlines()))


def _summary(verdicts: Sequence[Verdict]) -> str:
    errors = sum(verdict.level == Level.ERROR for verdict in verdicts)
    warnings = sum(verdict.level == Level.WARNING for verdict in verdicts)
    if not errors and not warnings:
        return "all is well"
    return f"{count_text(errors, 'error')}, {count_text(warnings, 'warning')}"
