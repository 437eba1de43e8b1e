"""What is special about etcd: mandates, lost answers, limits, and whose keys they are. With real servers."""

import json
import os
import subprocess
import urllib.request

import pytest
import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.engine import Compare, Operation
from droppexd.catalog.etcd import EtcdKeys, _nested, put
from droppexd.catalog.etcd_client import EtcdClient, encode, open_etcd_client, tls_context
from droppexd.catalog.etcd_group import EtcdSettings, open_etcd_group
from droppexd.daemon import system_runtime
from droppexd.errors import CatalogError, ConfigError, IdentityError, NotMaster
from tests.etcd_servers import Etcd, require_etcd, wipe

# A connection that breaks while a request is written leaves a generator of httpx's to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")

ONE, OTHER = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    require_etcd()
    etcd = Etcd(tmp_path_factory.mktemp("etcd"), count=1)
    etcd.start()
    yield etcd
    etcd.kill()


@pytest.fixture
def etcd(servers):
    servers.start()
    wipe(servers.endpoints[0])
    return servers


def run(main):
    async def bounded():
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


def settings(etcd, **fields):
    return EtcdSettings(etcd.endpoints, **({"lease_s": 2, "txn_s": 3.0} | fields))


def ask(etcd, path, question):
    request = urllib.request.Request(etcd.endpoints[0] + path, data=json.dumps(question).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


async def write(engine, key, value):
    return await engine.txn([], [Operation(key, value)])


async def fill(engine):
    for number in range(40):
        await write(engine, b"k%d" % number, os.urandom(1_000_000))


# -- the mandate -----------------------------------------------------------------------------------


def test_one_controller_has_the_mandate_and_the_next_gets_it_when_it_is_given_back(etcd):
    async def main():
        runtime, order = system_runtime(), []

        async def second(group):
            async with group.campaign(OTHER) as mandate:
                order.append("second")
                assert (await mandate.engine.get([b"a"]))[0].value == b"1"
                assert await write(mandate.engine, b"a", b"2")

        async with (
            open_etcd_group(settings(etcd), runtime) as one,
            open_etcd_group(settings(etcd), runtime) as two,
        ):
            async with trio.open_nursery() as nursery, one.campaign(ONE) as mandate:
                nursery.start_soon(second, two)
                await write(mandate.engine, b"a", b"1")
                await trio.sleep(1.5)
                assert order == []
                assert (one.master, two.master) == (ONE, ONE)
                order.append("first")
            assert order == ["first", "second"]
            with pytest.raises(CatalogError):
                await write(mandate.engine, b"a", b"3")

    run(main)


def test_a_master_that_did_not_notice_the_end_of_its_lease_changes_nothing(etcd):
    async def main():
        runtime = system_runtime()
        async with (
            open_etcd_group(settings(etcd), runtime) as one,
            open_etcd_group(settings(etcd), runtime) as two,
            one.campaign(ONE) as asleep,
        ):
            await write(asleep.engine, b"a", b"1")
            # What its own clock says does not count: the key in etcd is gone.
            ask(etcd, "/v3/lease/revoke", {"ID": asleep._lease})
            async with two.campaign(OTHER) as awake:
                await write(awake.engine, b"a", b"2")
                with pytest.raises(NotMaster):
                    await write(asleep.engine, b"a", b"3")
                with pytest.raises(NotMaster):
                    await write(asleep.engine, b"b", b"3")
                assert [e and e.value for e in await awake.engine.get([b"a", b"b"])] == [b"2", None]
                assert await write(awake.engine, b"c", b"4")

    run(main)


def test_a_mandate_that_cannot_be_renewed_is_lost_by_the_clock_of_its_holder(etcd):
    async def main():
        runtime = system_runtime()
        async with open_etcd_group(settings(etcd), runtime) as group, group.campaign(ONE) as mandate:
            etcd.members[0].stop()
            try:
                await mandate.lost()
            finally:
                etcd.members[0].go_on()

    run(main)


# -- answers that are lost -------------------------------------------------------------------------


class Forgetful(EtcdClient):
    """Loses the answer to some questions after etcd has given it."""

    lose = 0
    lost = 0

    async def _post(self, url, content):
        answer = await super()._post(url, content)
        if url.endswith("/v3/kv/txn") and b'"compare"' in content and self.lose:
            self.lose -= 1
            self.lost += 1
            return await self._forget(url)
        return answer

    async def _forget(self, url):
        return await super()._post(url.replace("127.0.0.1", "127.0.0.9"), b"{}")  # Nobody listens there.


def test_a_transaction_whose_answer_was_lost_is_carried_out_once_and_its_outcome_found(etcd):
    async def main():
        runtime = system_runtime()
        async with open_etcd_group(settings(etcd), runtime) as group, group.campaign(ONE) as mandate:
            engine = mandate.engine
            first = await write(engine, b"a", b"0")
            client = engine._client
            engine._client = Forgetful(client.endpoints, client._http)
            for index in range(1, 4):
                engine._client.lose = index
                compare = [Compare(b"a", first + index - 1)]
                assert await engine.txn(compare, [Operation(b"a", b"%d" % index)]) == first + index
            assert engine._client.lost == 6
            engine._client.lose = 1
            assert await engine.txn([Compare(b"a", 1)], [Operation(b"a", b"x")]) is None
            assert (await engine.get([b"a"]))[0].value == b"3"
            assert len(await engine.log(first - 1, 100)) == 4

    run(main)


def test_without_etcd_the_outcome_is_unknown_and_no_more_is_written(etcd):
    async def main():
        async with open_etcd_group(settings(etcd), system_runtime()) as group, group.campaign(ONE) as mandate:
            await write(mandate.engine, b"a", b"1")
            etcd.kill()
            with pytest.raises(CatalogError, match="does not answer"):
                await write(mandate.engine, b"a", b"2")
            etcd.start()
            with pytest.raises(CatalogError):
                await write(mandate.engine, b"a", b"3")
            assert group.health.failure

    run(main)


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 40, 41, 1600, 1601, 64_000])
def test_operations_are_nested_so_that_no_path_has_more_than_etcd_takes(count):
    def most(operations):
        inner = [most(one["request_txn"]["success"]) for one in operations if "request_txn" in one]
        return len(operations) + max(inner, default=0)

    def leaves(operations):
        return sum(leaves(one["request_txn"]["success"]) if "request_txn" in one else 1 for one in operations)

    nested = _nested([put(b"k", b"v")] * count)
    assert leaves(nested) == count
    assert most(nested) + 1 <= 128  # And the key `txn`.


def test_as_many_keys_as_the_catalogue_writes_at_once_are_one_transaction(etcd):
    async def main():
        async with (
            open_etcd_group(settings(etcd, txn_s=30.0), system_runtime()) as group,
            group.campaign(ONE) as mandate,
        ):
            engine = mandate.engine
            keys = [b"k%05d" % number for number in range(9000)]
            revision = await engine.txn([], [Operation(key, os.urandom(90)) for key in keys])
            found = await engine.get(keys)
            assert {entry.revision for entry in found} == {revision}
            assert [entry.key for entry in await engine.range(b"k", b"l", 10_000)] == keys
            deleted = await engine.txn([Compare(keys[0], revision)], [Operation(key, None) for key in keys])
            assert deleted == revision + 1
            assert await engine.range(b"k", b"l", 10) == []

    run(main)


# -- whose keys they are ---------------------------------------------------------------------------


def test_keys_of_others_below_the_prefix_are_left_alone(etcd):
    async def main():
        ask(etcd, "/v3/kv/put", {"key": encode(b"droppex/theirs"), "value": encode(b"x")})
        async with open_etcd_group(settings(etcd), system_runtime()) as group:
            with pytest.raises(IdentityError, match=r"not droppex's.*theirs.*etcd_prefix"):
                async with group.campaign(ONE):
                    pass
        async with (
            open_etcd_group(settings(etcd, prefix="ours/"), system_runtime()) as group,
            group.campaign(ONE),
        ):
            pass
        assert ask(etcd, "/v3/kv/range", {"key": encode(b"droppex/theirs")})["count"] == "1"

    run(main)


def test_a_format_of_another_release_is_refused(etcd):
    async def main():
        ask(etcd, "/v3/kv/put", {"key": encode(b"droppex/format"), "value": encode(b"droppex 9")})
        async with open_etcd_group(settings(etcd), system_runtime()) as group:
            with pytest.raises(IdentityError, match="droppex 9"):
                async with group.campaign(ONE):
                    pass

    run(main)


def test_two_clusters_share_an_etcd(etcd):
    async def main():
        runtime = system_runtime()
        one, two = settings(etcd, prefix="one/"), settings(etcd, prefix="two/")
        async with (
            open_etcd_group(one, runtime) as first,
            open_etcd_group(two, runtime) as second,
            first.campaign(ONE) as mine,
            second.campaign(OTHER) as yours,
            open_catalogue(mine.engine, runtime) as a,
            open_catalogue(yours.engine, runtime) as b,
        ):
            assert a.cluster_id != b.cluster_id
            assert await a.open_session("tcp://127.0.0.1:5", bytes(16))
            assert b.sessions == {}

    run(main)


def test_the_keys_of_a_prefix_end_before_the_next():
    assert EtcdKeys("droppex/").end == b"droppex0"


# -- health ----------------------------------------------------------------------------------------


def test_a_database_that_fills_up_is_told_of_before_it_is_full(etcd):
    async def main():
        small = settings(etcd, quota_bytes=10_000)  # An empty database takes more.
        async with open_etcd_group(small, system_runtime()) as group:
            while not group.health.warnings:
                await trio.sleep(0.05)
            (warning,) = group.health.warnings
            assert "of its quota" in warning

    run(main)


def test_an_alarm_of_etcd_is_told_and_what_to_do(tmp_path):
    require_etcd()
    full = Etcd(tmp_path / "full", count=1, options=["--quota-backend-bytes", str(16 * 1024 * 1024)])
    full.start()

    async def main():
        async with open_etcd_group(settings(full), system_runtime()) as group, group.campaign(ONE) as mandate:
            with pytest.raises(CatalogError, match="set-up-etcd"):
                await fill(mandate.engine)
            assert any("NOSPACE" in warning for warning in await group._look())

    try:
        run(main)
    finally:
        full.kill()


def test_a_member_that_does_not_answer_is_named(etcd):
    async def main():
        nobody = "http://127.0.0.9:9"
        both = EtcdSettings((nobody, *etcd.endpoints), lease_s=2)
        async with open_etcd_group(both, system_runtime()) as group, group.campaign(ONE) as mandate:
            assert await write(mandate.engine, b"a", b"1")
            assert any(nobody in warning for warning in await group._look())

    run(main)


@pytest.mark.parametrize("body", [b"hello", b"{}", b"[1]"])
def test_what_is_no_etcd_is_told(body):
    async def main():
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]

        async def answer(stream):
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, answer, listeners)
            async with open_etcd_client([f"http://127.0.0.1:{port}"]) as client:
                with pytest.raises(CatalogError, match="does not answer as etcd does"):
                    await client.ask("/v3/kv/range", {"key": "AA=="}, timeout_s=1)
            nursery.cancel_scope.cancel()

    run(main)


# -- TLS -------------------------------------------------------------------------------------------


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path):
    """A certificate for 127.0.0.1 that signs itself, for the server and for its clients."""
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=droppex test"]
    openssl(tmp_path, "req", "-x509", *options, "-keyout", "key.pem", "-out", "cert.pem",
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "extendedKeyUsage=serverAuth,clientAuth")  # fmt: skip
    return tmp_path


def test_etcd_and_controllers_prove_themselves_with_certificates(certificates):
    require_etcd()
    cert, key = str(certificates / "cert.pem"), str(certificates / "key.pem")
    secure = Etcd(certificates / "etcd", count=1, tls=(cert, key))
    secure.start()

    async def main():
        runtime = system_runtime()
        good = tls_context(cert, cert, key)
        async with open_etcd_group(settings(secure), runtime, good) as group, group.campaign(ONE) as mandate:
            assert await write(mandate.engine, b"a", b"1")
        for bad in (tls_context("", cert, key), tls_context(cert, "", "")):
            async with open_etcd_client(secure.endpoints, bad) as client:
                with pytest.raises(CatalogError, match="does not answer"):
                    await client.ask("/v3/kv/range", {"key": "AA=="}, timeout_s=1)

    try:
        run(main)
    finally:
        secure.kill()


def test_files_that_are_no_certificates_are_told(tmp_path):
    (tmp_path / "rubbish").write_text("rubbish")
    with pytest.raises(ConfigError, match="rubbish"):
        tls_context(str(tmp_path / "rubbish"), "", "")
    with pytest.raises(ConfigError, match="nowhere"):
        tls_context("", str(tmp_path / "nowhere"), "")
