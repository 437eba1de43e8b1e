"""What the doctor makes of the addresses where roles listen."""

import errno
import socket

import pytest

from droppexd.doctor.ports import Listening, judge_listening, reached_at, split_address, try_to_bind
from droppexd.model import Role
from droppexd.wire.group_messages import PeerReport

ADDRESS = "tcp://127.0.0.1:7702"
ANSWERS = PeerReport(role="pool", name="attic", address=ADDRESS, round_trip_us=300)
SILENT = PeerReport(role="pool", name="attic", address=ADDRESS, code="timeout", failure="no answer")


def judged(report=None, bind_error=0, advertised=None, address=ADDRESS):
    return judge_listening(Listening(Role.POOL, address, report, bind_error, advertised))


def test_a_role_that_answers_holds_its_address():
    verdict = judged(ANSWERS)
    assert (verdict.level, verdict.subject) == ("ok", ADDRESS)
    assert "held by the pool attic" in verdict.text


def test_an_address_that_is_free_is_no_fault():
    verdict = judged(SILENT)
    assert verdict.level == "ok"
    assert "is free" in verdict.text


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EADDRINUSE, "in use by something that does not answer as a pool"),
        (errno.EADDRNOTAVAIL, "is no address of this machine"),
        (errno.EACCES, "below 1024"),
        (errno.EPROTONOSUPPORT, "EPROTONOSUPPORT"),
    ],
)
def test_an_address_that_cannot_be_had_is_an_error_with_the_reason(number, said):
    verdict = judged(SILENT, number)
    assert verdict.level == "error"
    assert said in verdict.text
    assert verdict.advice


def test_another_role_at_the_address_is_named():
    other = PeerReport(
        role="pool", name="attic", address=ADDRESS, code="identity", failure=f"{ADDRESS} is the app nas"
    )
    verdict = judged(other, errno.EADDRINUSE)
    assert verdict.level == "error"
    assert "the app nas" in verdict.text


def test_who_holds_it_cannot_be_told_without_keys_or_with_a_revoked_one():
    assert judged(None, errno.EADDRINUSE).level == "warning"
    revoked = PeerReport(role="pool", name="attic", address=ADDRESS, code="key-refused", failure="no member")
    assert judged(revoked, errno.EADDRINUSE).level == "warning"


def test_where_others_are_sent_must_answer_too():
    elsewhere = PeerReport(
        role="pool", name="attic", address="tcp://nas:7702", code="peer", failure="not reachable"
    )
    verdict = judged(ANSWERS, advertised=elsewhere)
    assert verdict.level == "warning"
    assert "tcp://nas:7702" in verdict.text
    assert "advertise" in verdict.advice
    assert judged(ANSWERS, advertised=ANSWERS).level == "ok"


def test_any_port_is_no_fault():
    assert judged(address="tcp://127.0.0.1:0").level == "ok"


def test_addresses_are_taken_apart_and_reached_on_this_machine():
    assert split_address("tcp://[::1]:7702") == ("::1", 7702)
    assert split_address("tcp://*:7702") == ("", 7702)
    assert [reached_at(f"tcp://{host}:1") for host in ("*", "0.0.0.0", "[::]", "nas", "[::1]")] == [
        "tcp://127.0.0.1:1",
        "tcp://127.0.0.1:1",
        "tcp://[::1]:1",
        "tcp://nas:1",
        "tcp://[::1]:1",
    ]


def test_binding_for_a_moment_tells_free_from_taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        assert try_to_bind(taken) == errno.EADDRINUSE
    assert try_to_bind(taken) == 0
    assert try_to_bind("tcp://192.0.2.1:7702") == errno.EADDRNOTAVAIL
    assert try_to_bind("tcp://no.such.host.invalid:7702") == errno.EADDRNOTAVAIL
