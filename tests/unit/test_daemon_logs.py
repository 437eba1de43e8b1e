"""Logs of the daemon: one line an event, whatever is in it."""

import io
import json
import logging
import re

import pytest

from droppexd.cli.daemon_logs import LogfmtFormatter, set_up_logs


@pytest.fixture
def line():
    def format_line(text, *arguments, exc_info=None):
        record = logging.LogRecord("droppex.pool", logging.WARNING, __file__, 1, text, arguments, exc_info)
        record.created = 1.5
        return LogfmtFormatter().format(record)

    return format_line


def test_fields_at_the_end_of_a_message_become_fields_of_the_line(line):
    assert line("pool ready name=%s number=%d", "p1", 3) == (
        'time=1970-01-01T00:00:01.500Z level=warning from=pool msg="pool ready" name=p1 number=3'
    )


def test_a_message_that_is_only_fields_or_has_none_stays_readable(line):
    assert line("dropped").endswith("from=pool msg=dropped")
    assert line("shards=3").endswith('from=pool msg="" shards=3')
    assert line("a=b is no field here").endswith('msg="a=b is no field here"')


@pytest.mark.parametrize(
    "text", ["two\nlines x=1", 'quote " and \\ ', "\x1b[31mred", "level=error\rmsg=fake"]
)
def test_no_message_can_forge_a_line(line, text):
    formatted = line("lost %s", text)
    assert formatted.isprintable()
    (message,) = re.findall(r'msg=("(?:[^"\\]|\\.)*")', formatted)
    assert json.loads(message) == f"lost {text}".rstrip("\r") or json.loads(message) == f"lost {text}"


def test_the_trace_of_a_bug_stays_on_the_line(line):
    try:
        raise KeyError("x\ny")
    except KeyError as error:
        formatted = line("a bug", exc_info=(type(error), error, error.__traceback__))
    assert "\n" not in formatted
    assert "KeyError" in formatted


@pytest.fixture
def unchanged_logging():
    loggers = [logging.getLogger(name) for name in (None, "droppex", "droppexd")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.mark.usefixtures("unchanged_logging")
def test_the_level_is_for_droppex_and_libraries_only_warn():
    stream = io.StringIO()
    set_up_logs("info", stream)
    logging.getLogger("droppex.app").info("told")
    logging.getLogger("droppexd.wire.rpc").debug("not told")
    logging.getLogger("asyncio").info("not told")
    logging.getLogger("asyncio").warning("told")
    assert [line.split("msg=")[1] for line in stream.getvalue().splitlines()] == ["told", "told"]
