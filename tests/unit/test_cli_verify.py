"""`verify` against a cluster that says what it is told to: what is waited for, told, and the exit code."""

import io
import json

import pytest
import trio
from trio.testing import MockClock

from droppexd.cli.client_session import Session
from droppexd.cli.client_verify import verify_everything, verify_file
from droppexd.cli.render import Output
from droppexd.errors import NotFound, PeerError
from droppexd.model import ExtentId, VersionId
from droppexd.wire.messages import (
    FileChecked,
    PoolScrub,
    ScrubFinding,
    ScrubProgress,
    ScrubSummary,
    ShardFault,
    ShardName,
)


def summary(number, *, ended_ms=0, **fields):
    values = {"requested": True, "begun_ms": 1, "shards": 10, "size": 1000, "lost": 0, "unreadable": 0}
    return ScrubSummary(**{**values, "number": number, "ended_ms": ended_ms, **fields})


def scrub(pool, current=None, last=None, error=""):
    progress = None
    if not error:
        progress = ScrubProgress(current=current, last=last, held=20, expected_size=2000, rate=1)
    return PoolScrub(pool=pool, name=f"pool-{pool}", machine="m", progress=progress, error=error)


def running(pool, number=5):
    return scrub(pool, current=summary(number))


def done(pool, number=5, **fields):
    return scrub(pool, last=summary(number, ended_ms=9, **fields))


class FakeClient:
    """Answers each question with the next of its answers, and the last one for ever."""

    def __init__(self, *answers, findings=()):
        self.answers = list(answers)
        self.findings = findings
        self.started = []
        self.asked = []

    async def watch_scrubs(self, *, start=False):
        await trio.lowlevel.checkpoint()
        self.started.append(start)
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def list_findings(self, pool, number):
        await trio.lowlevel.checkpoint()
        self.asked.append((pool, number))
        return self.findings

    async def check_file(self, name):
        assert name == "a"
        for answer in self.answers:
            await trio.lowlevel.checkpoint()
            if isinstance(answer, Exception):
                raise answer
            yield answer


@pytest.fixture
def run():
    """Run a verification and return its exit code and what it printed."""

    def run_it(work, client, *arguments, **options):
        stdout = io.StringIO()
        output = Output(
            quiet=options.pop("quiet", False),
            as_json=options.pop("as_json", False),
            stdout=stdout,
            stderr=io.StringIO(),
        )

        async def main():
            return await work(Session(client, output), *arguments, exact=False)

        code = trio.run(main, clock=MockClock(autojump_threshold=0))
        return int(code), stdout.getvalue()

    return run_it


# -- everything ----------------------------------------------------------------------------------------


def test_sound_pools_are_waited_for_and_told(run):
    client = FakeClient(
        [running(1), running(2)],
        [running(1), done(2)],
        [running(1), done(2, 6)],  # Another pass of a pool that is done does not matter.
        [done(1), running(2, 7)],
    )
    code, text = run(verify_everything, client)
    assert client.started == [True, False, False, False]
    assert code == 0
    lines = text.splitlines()
    assert len(lines) == 4
    assert "verified 20 shards, 2.0 KiB, on 2 pools" in lines[-1]
    assert lines[-1].endswith("all is sound")


FINDING = ScrubFinding(
    ShardName(ExtentId(1, 2), 3), "damaged", 100, "files/a\x1b", VersionId(1, 1), "piece 0 is wrong"
)
NAMELESS = FINDING._replace(name="", version=None, reason="the header is damaged")


def test_what_was_found_is_named_with_file_shard_and_pool(run):
    client = FakeClient(
        [running(1), running(2)],
        [done(1), done(2, lost=3, unreadable=1)],
        findings=(FINDING, NAMELESS),
    )
    code, text = run(verify_everything, client)
    assert (code, client.asked) == (1, [(2, 5)])
    assert "damaged: files/a\\x1b, shard 3 of extent 1-2 on pool-2: piece 0 is wrong" in text
    assert "damaged: shard 3 of extent 1-2 on pool-2: the header is damaged" in text
    assert "and 2 more shards on pool-2" in text
    assert text.endswith("3 shards lost, 1 shard that could not be read\n")


def test_the_document_tells_the_same(run):
    answers = [running(1), running(2), scrub(3, error="the pool is down")]
    client = FakeClient(answers, [done(1), done(2, lost=1)], findings=(FINDING,))
    code, text = run(verify_everything, client, as_json=True)
    document = json.loads(text)
    assert code == 1
    assert document.pop("seconds") >= 0
    pools = document.pop("pools")
    assert document == {
        "sound": False,
        "shards": 20,
        "size": 2000,
        "lost": 1,
        "unreadable": 0,
        "unasked": 1,
    }
    assert [(pool["number"], pool["lost"], pool["error"]) for pool in pools] == [
        (1, 0, None),
        (2, 1, None),
        (3, 0, "the pool is down"),
    ]
    (finding,) = pools[1]["findings"]
    assert (finding["name"], finding["extent"], finding["version"]) == ("files/a\x1b", "1-2", "1-1")


def test_a_pool_that_could_not_be_asked_makes_it_6(run):
    client = FakeClient([running(1), scrub(2, error="the pool is down")], [done(1)])
    code, text = run(verify_everything, client)
    assert code == 6
    assert "not verified: pool-2: the pool is down" in text
    assert text.endswith("1 pool not asked\n")


def test_a_pass_that_broke_off_makes_it_1(run):
    client = FakeClient([running(1)], [done(1, trouble="the database is damaged")])
    code, text = run(verify_everything, client)
    assert code == 1
    assert "broken off on pool-1: the database is damaged" in text


def test_a_pool_may_be_away_for_a_moment_and_not_for_long(run):
    away = scrub(1, error="unreachable")
    code, _ = run(verify_everything, FakeClient([running(1)], *[[away]] * 50, [done(1)]))
    assert code == 0
    code, text = run(verify_everything, FakeClient([running(1)], [away]))
    assert code == 6
    assert "began, and cannot be asked any more: unreachable" in text
    code, text = run(verify_everything, FakeClient([running(1), running(2)], [done(2)]))
    assert code == 6
    assert "not a pool of the cluster any more" in text


def test_a_pool_that_forgot_its_pass_is_not_waited_for(run):
    code, text = run(verify_everything, FakeClient([running(1)], [running(1, 1)]))
    assert code == 6
    assert "does not know of it any more" in text
    code, text = run(verify_everything, FakeClient([scrub(1)]))
    assert code == 6


def test_the_app_may_be_away_for_a_moment_and_not_for_long(run):
    gone = PeerError("no answer")
    assert run(verify_everything, FakeClient([running(1)], *[gone] * 50, [done(1)]))[0] == 0
    with pytest.raises(PeerError):
        run(verify_everything, FakeClient([running(1)], gone))
    with pytest.raises(PeerError):
        run(verify_everything, FakeClient(gone))


def test_a_cluster_without_pools_is_sound(run):
    code, text = run(verify_everything, FakeClient([]))
    assert code == 0
    assert "0 shards" in text


def test_quiet_prints_nothing(run):
    assert run(verify_everything, FakeClient([running(1)], [done(1)]), quiet=True) == (0, "")


# -- one file ------------------------------------------------------------------------------------------


def page(first=0, **fields):
    values = {
        "name": "files/a",
        "version": VersionId(1, 9),
        "size": 5000,
        "extents": 2,
        "next": 0,
        "checked_size": 2500,
        "shards": 3,
        "verified_size": 3000,
        "faults": (),
        "survives_pools": 1,
        "survives_machines": 1,
    }
    return FileChecked(**{**values, **fields})


def fault(state, shard=1, pool=2):
    name = "pool-2" if pool else ""
    return ShardFault(1, shard, state, pool, name, "m", "why" if state == "unreachable" else "")


def test_a_sound_file_is_sound(run):
    code, text = run(verify_file, FakeClient(page(next=1), page()), "a")
    assert code == 0
    assert text.startswith("files/a: 6 shards of 2 extents: 6 sound; verified 5.9 KiB")
    assert text.endswith("survives the loss of 1 pool or 1 machine\n")


@pytest.mark.parametrize(
    ("faults", "survives", "code"),
    [
        ((fault("damaged"),), 0, 1),
        ((fault("missing", pool=0),), 0, 1),
        ((fault("absent"),), 0, 1),
        ((fault("unreadable"),), 0, 1),
        ((fault("unreachable"),), 0, 6),
        ((fault("unreachable"), fault("missing", 2, 0)), 0, 1),
        ((fault("unreachable"), fault("unreachable", 2)), -1, 5),
        ((fault("damaged"), fault("damaged", 2)), -1, 5),
    ],
)
def test_the_exit_code_says_what_is_wrong(run, faults, survives, code):
    client = FakeClient(
        page(next=1), page(faults=faults, survives_pools=survives, survives_machines=survives)
    )
    assert run(verify_file, client, "a")[0] == code


def test_what_is_wrong_is_told_in_lines_and_in_the_document(run):
    pages = (
        page(next=1),
        page(faults=(fault("damaged"), fault("missing", 2, 0), fault("unreachable", 0)), survives_pools=-2),
    )
    code, text = run(verify_file, FakeClient(*pages), "a")
    assert code == 5
    assert text.splitlines()[:3] == [
        "damaged: shard 1 of extent 1 on pool-2",
        "missing: shard 2 of extent 1",
        "unreachable: shard 0 of extent 1 on pool-2: why",
    ]
    assert "3 sound, 1 missing, 1 damaged, 1 unreachable" in text
    code, text = run(verify_file, FakeClient(*pages), "a", as_json=True)
    document = json.loads(text)
    assert code == 5
    assert (document["shards"], document["sound"], document["missing"], document["absent"]) == (6, 3, 1, 0)
    assert (document["damaged"], document["unreachable"], document["survives_pools"]) == (1, 1, -2)
    assert [found["pool"] for found in document["faults"]] == [2, None, 2]


def test_an_empty_file_is_kept_in_the_catalogue_alone(run):
    empty = page(size=0, extents=0, shards=0, checked_size=0, survives_pools=None, survives_machines=None)
    code, text = run(verify_file, FakeClient(empty), "a")
    assert code == 0
    assert "kept in the catalogue alone" in text


def test_a_file_that_goes_away_meanwhile_is_an_error(run):
    with pytest.raises(NotFound):
        run(verify_file, FakeClient(page(next=1), NotFound("gone")), "a")
