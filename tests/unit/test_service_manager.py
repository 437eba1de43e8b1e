"""What systemd is told, and events in its journal."""

import logging
import os
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest
import trio
import trio.testing

from droppexd.cli import daemon_logs
from droppexd.cli.daemon_logs import JournalHandler, journal_handler
from droppexd.service_manager import ServiceManager


@pytest.fixture
def hear(tmp_path):
    """A socket like those of systemd, and what it was told."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.setblocking(False)

        def heard():
            told = []
            while True:
                try:
                    told.append(listener.recv(65536))
                except BlockingIOError:
                    return told

        heard.path = path
        yield heard


def test_readiness_and_the_end_are_told(hear):
    manager = ServiceManager.of({"NOTIFY_SOCKET": hear.path})
    manager.status("starting: pool")
    manager.ready("pool at tcp://10.0.0.1:7702")
    manager.stopping()
    assert hear() == [
        b"STATUS=starting: pool",
        b"READY=1\nSTATUS=pool at tcp://10.0.0.1:7702",
        b"STOPPING=1\nSTATUS=stopping",
    ]


def test_no_status_can_forge_a_line(hear):
    ServiceManager.of({"NOTIFY_SOCKET": hear.path}).status("x\nREADY=1" + "y" * 1000)
    (told,) = hear()
    assert told.startswith(b"STATUS=x?READY=1")
    assert b"\n" not in told
    assert len(told) < 300


def test_an_abstract_socket_is_spoken_to():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0droppex-test-{os.getpid()}")
        ServiceManager.of({"NOTIFY_SOCKET": f"@droppex-test-{os.getpid()}"}).stopping()
        assert b"STOPPING=1" in listener.recv(1000)


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "/no/such/socket"])
def test_without_a_manager_that_hears_nothing_happens(address):
    manager = ServiceManager.of({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"})
    manager.ready("")
    manager.stopping()


@pytest.mark.parametrize(("whose", "count"), [("", 4), ("own", 4), ("another's", 0)])
def test_the_watchdog_is_fed_thrice_in_its_time(hear, whose, count):
    environment = {"NOTIFY_SOCKET": hear.path, "WATCHDOG_USEC": "30000000"}
    if whose:
        environment["WATCHDOG_PID"] = str(os.getpid() if whose == "own" else 1)

    async def main():
        with trio.move_on_after(35):
            await ServiceManager.of(environment).watch()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert hear() == [b"WATCHDOG=1"] * count


# -- the journal -----------------------------------------------------------------------------------


def record(text, *arguments, level=logging.WARNING, exc_info=None):
    return logging.LogRecord("droppex.pool", level, "/x/pool.py", 7, text, arguments, exc_info, "announce")


def fields_of(datagram):
    """Take a datagram of the journal's protocol apart."""
    fields, rest = {}, datagram
    while rest:
        name, separator, rest = (
            rest.partition(b"=")
            if b"=" in rest.partition(b"\n")[0]
            else (rest.partition(b"\n")[0], b"\n", rest.partition(b"\n")[2])
        )
        if separator == b"=":
            value, _, rest = rest.partition(b"\n")
        else:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[9 + length :]
        fields[name.decode()] = value.decode()
    return fields


def test_events_go_to_the_journal_with_their_fields(hear):
    handler = JournalHandler(hear.path)
    handler.emit(record("pool announced number=%d name=%s", 3, "nas"))
    handler.emit(record("lost %s", "two\nlines PRIORITY=0", level=logging.INFO))
    one, other = map(fields_of, hear())
    assert one == {
        "MESSAGE": "pool announced number=3 name=nas",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "droppexd",
        "DROPPEX_FROM": "pool",
        "DROPPEX_NUMBER": "3",
        "DROPPEX_NAME": "nas",
        "CODE_FILE": "/x/pool.py",
        "CODE_LINE": "7",
        "CODE_FUNC": "announce",
    }
    assert other["MESSAGE"] == "lost two\nlines PRIORITY=0"
    assert other["PRIORITY"] == "6"
    handler.close()


def test_the_trace_of_a_bug_is_a_field(hear):
    try:
        raise KeyError("x\ny")
    except KeyError as error:
        with closing(JournalHandler(hear.path)) as handler:
            handler.emit(record("a bug", exc_info=(KeyError, error, error.__traceback__)))
    (told,) = map(fields_of, hear())
    assert "KeyError" in told["DROPPEX_TRACE"]


def test_what_the_journal_does_not_take_goes_to_standard_error(hear, capsys):
    with closing(JournalHandler(hear.path)) as handler:
        Path(hear.path).unlink()
        handler.emit(record("x" * 1_000_000))
    assert "level=warning" in capsys.readouterr().err


def test_the_journal_is_used_only_where_standard_error_leads_there(hear, monkeypatch, tmp_path):
    monkeypatch.setattr(daemon_logs, "JOURNAL_SOCKET", hear.path)
    with (tmp_path / "err").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        state = os.fstat(file.fileno())
        assert journal_handler({}) is None
        assert journal_handler({"JOURNAL_STREAM": f"{state.st_dev}:{state.st_ino + 1}"}) is None
        handler = journal_handler({"JOURNAL_STREAM": f"{state.st_dev}:{state.st_ino}"})
        assert isinstance(handler, JournalHandler)
        handler.close()
