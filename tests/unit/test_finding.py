"""Where controllers are found besides at the addresses that were given."""

import http.server
import itertools
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from typing import ClassVar

import pytest
import trio
from trio.testing import MockClock

from droppexd.bucket import BucketError, Whereabouts, read_url, sign
from droppexd.daemon import ThreadsLeftBehind
from droppexd.errors import NotMaster, PeerError
from droppexd.finding import GRACE_S, Bucket, Finder
from droppexd.model import Role
from droppexd.roles.master import MasterLink
from droppexd.wire.messages import Ping, Pong

SECRET = bytes(range(32))
CLUSTER = b"\x01" * 16
TOLD = Whereabouts(CLUSTER, 7, "tcp://10.0.0.1:1", ("tcp://10.0.0.1:1", "tcp://10.0.0.2:1"))


@pytest.fixture
def public():
    from nacl.signing import SigningKey

    return bytes(SigningKey(SECRET).verify_key)


def test_a_file_is_written_by_who_has_the_key_and_read_by_all(tmp_path, public):
    async def main():
        url = f"file://{tmp_path}/dropp%20ex.json"
        threads = ThreadsLeftBehind()
        reader, writer = Bucket(url, public, threads), Bucket(url, public, threads, SECRET)
        with pytest.raises(BucketError, match="No such file"):
            await reader.read(0)
        assert await reader.publish(TOLD)  # Without the key nothing is written.
        assert not (tmp_path / "dropp ex.json").exists()
        assert await writer.publish(TOLD)
        assert (tmp_path / "dropp ex.json").exists()
        assert await reader.read(7, CLUSTER) == TOLD
        assert await reader.read(3) == TOLD
        with pytest.raises(BucketError, match=r"term 7.*term 8"):
            await reader.read(8)
        with pytest.raises(BucketError, match="another cluster"):
            await reader.read(7, bytes(16))

    trio.run(main)


def test_no_term_is_believed_below_one_that_was(tmp_path, public):
    async def main():
        bucket = Bucket(f"file://{tmp_path}/b", public, ThreadsLeftBehind(), SECRET)
        other = TOLD._replace(cluster_id=bytes(16), term=2)
        for told in (TOLD, TOLD._replace(term=9), other, other._replace(term=3)):
            await bucket.publish(told)
            assert await bucket.read(0) == told
        await bucket.publish(other)
        with pytest.raises(BucketError, match=r"term 2.*term 3"):
            await bucket.read(0)

    trio.run(main)


def test_a_file_that_cannot_be_written_is_logged_once_and_no_more(tmp_path, public, caplog):
    caplog.set_level("INFO")

    async def main():
        bucket = Bucket(f"file://{tmp_path}/later/b", public, ThreadsLeftBehind(), SECRET)
        for _ in range(3):
            assert not await bucket.publish(TOLD)
        assert caplog.text.count("is not up to date") == 1
        (tmp_path / "later").mkdir()
        assert await bucket.publish(TOLD)
        assert await bucket.publish(TOLD)
        assert caplog.text.count("is up to date again") == 1

    trio.run(main)


async def hang(_function, *_args):
    await trio.sleep_forever()


def test_nobody_waits_for_a_share_that_hangs(public, caplog):
    async def main():
        bucket = Bucket("file:///mnt/share/b", public, hang, SECRET)
        assert await Finder([], bucket).find(0) == ()
        assert "the bucket file:///mnt/share/b does not tell" in caplog.text
        assert "no answer in time" in caplog.text
        assert not await bucket.publish(TOLD)
        assert "cannot be written in time" in caplog.text

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_call_that_hangs_is_left_behind_and_takes_no_second_thread():
    begun, go_on, order = threading.Event(), threading.Event(), []

    def hang_for_long():
        begun.set()
        go_on.wait(10)
        order.append("first")

    async def main():
        threads = ThreadsLeftBehind()
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_begun, scope)
                await threads(hang_for_long)
            assert scope.cancelled_caught
            assert not order
            nursery.start_soon(threads, order.append, "second")
            await trio.testing.wait_all_tasks_blocked()
            assert not order
            go_on.set()
        assert order == ["first", "second"]

    async def cancel_when_begun(scope):
        while not begun.is_set():
            await trio.sleep(0.001)
        scope.cancel()

    trio.run(main)


class Site(http.server.BaseHTTPRequestHandler):
    pages: ClassVar = {}

    def do_GET(self):
        status, body = self.pages.get(self.path, (404, b""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(certificate=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_name("key.pem"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def site():
    with serving() as url:
        yield url


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1 that signs itself."""
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=droppex test"]
    subprocess.run(
        ["openssl", "req", "-x509", *options, "-keyout", "key.pem", "-out", "cert.pem",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    return tmp_path / "cert.pem"


def test_a_url_is_believed_only_by_who_trusts_its_certificate(certificate, public, monkeypatch):
    Site.pages = {"/droppex.json": (200, sign(TOLD, SECRET))}

    async def main():
        with serving(certificate) as url:
            bucket = Bucket(f"{url}/droppex.json", public, ThreadsLeftBehind())
            with pytest.raises(BucketError, match=r"(?i)certificate.verify.failed"):
                await bucket.read(0)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert await bucket.read(0) == TOLD
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("nowhere.pem")))
            with pytest.raises(BucketError, match="No such file"):
                await bucket.read(0)

    trio.run(main)


def test_a_url_is_read_within_bounds(site, public):
    Site.pages = {"/good": (200, sign(TOLD, SECRET)), "/large": (200, bytes(70_000)), "/moved": (302, b"")}

    async def main():
        bucket = Bucket(f"{site}/good", public, ThreadsLeftBehind(), SECRET)
        assert await bucket.read(0) == TOLD
        await bucket.publish(TOLD)
        for path, reason in (("/none", "404"), ("/moved", "302"), ("/large", "more than 64 KiB")):
            with pytest.raises(BucketError, match=reason):
                await read_url(site + path)
        with pytest.raises(BucketError, match="failed"):
            await read_url("http://127.0.0.9:9/")

    trio.run(main)


@pytest.mark.parametrize("host", ["a..b", ".", "a" * 64])
def test_a_name_that_cannot_be_one_is_of_no_use_and_no_more(host, caplog):
    assert trio.run(Finder([f"tcp://{host}:1"]).find, 0) == ()
    assert f"{host} does not tell" in caplog.text


async def run_inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


class Names:
    def __init__(self, **known):
        self.known = known

    async def __call__(self, host, port):
        await trio.lowlevel.checkpoint()
        if host not in self.known:
            raise OSError(-2, "Name or service not known")
        return self.known[host]


def test_all_addresses_behind_a_name_and_those_of_the_bucket_are_found_in_order(tmp_path, public):
    async def main():
        bucket = Bucket(f"file://{tmp_path}/b", public, ThreadsLeftBehind(), SECRET)
        await bucket.publish(TOLD)
        names = Names(cluster=["10.0.1.1", "10.0.1.2", "fd00::1"])
        seeds = ["tcp://10.0.0.9:5", "tcp://cluster:77", "tcp://[::1]:5"]
        found = await Finder(seeds, bucket, names).find(0)
        assert found == (
            "tcp://10.0.1.1:77",
            "tcp://10.0.1.2:77",
            "tcp://[fd00::1]:77",
            "tcp://10.0.0.1:1",
            "tcp://10.0.0.2:1",
        )

    trio.run(main)


def test_a_silent_source_costs_no_other_its_time(tmp_path, public, caplog):
    async def silent(_host, _port):
        await trio.sleep_forever()

    async def main():
        bucket = Bucket(f"file://{tmp_path}/b", public, run_inline, SECRET)
        await bucket.publish(TOLD)
        finder = Finder(["tcp://one:1", "tcp://two:1", "tcp://three:1"], bucket, silent)
        began = trio.current_time()
        assert await finder.find(0) == TOLD.controllers
        assert trio.current_time() - began <= GRACE_S  # Of the mock clock.
        assert caplog.text.count("no answer in time") == 3

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_search_that_its_caller_ends_is_no_reason_to_complain(public, caplog):
    async def main():
        with trio.move_on_after(1):
            await Finder([], Bucket("file:///mnt/share/b", public, hang)).find(0)
        assert not caplog.text

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_source_of_no_use_is_logged_once_for_each_reason_and_the_next_one_counts(tmp_path, public, caplog):
    async def main():
        names = Names()
        bucket = Bucket(f"file://{tmp_path}/b", public, ThreadsLeftBehind(), SECRET)
        finder = Finder(["tcp://gone:1", "tcp://cluster:2"], bucket, names)
        for _ in range(3):
            assert await finder.find(0) == ()
        assert caplog.text.count("gone does not tell") == 1
        assert caplog.text.count("the bucket") == 1
        names.known["cluster"] = ["10.0.0.5"]
        (tmp_path / "b").write_bytes(b"{}")
        assert await finder.find(0) == ("tcp://10.0.0.5:2",)
        assert "no such document" in caplog.text
        await bucket.publish(TOLD)
        assert await finder.find(9) == ("tcp://10.0.0.5:2",)
        assert "term 9" in caplog.text
        assert TOLD.master in await finder.find(7)

    trio.run(main)


# -- looking for the master ------------------------------------------------------------------------


def test_other_sources_are_asked_when_no_controller_answers(play):
    async def story(stage):
        async def ping(_call, _request, _body):
            return Pong(role="controller", name="found", boot_id=b"")

        address = await stage.serve("found", {Ping: ping}, role=Role.CONTROLLER)
        asked = []

        async def find():
            asked.append(stage.runtime.clock.now())
            return (address,) if len(asked) > 2 else ()

        link = MasterLink(await stage.connections("pool"), ["tcp://127.0.0.1:9"], stage.runtime, find)
        assert (await link.call(Ping(), timeout_s=60)).name == "found"
        assert len(asked) == 3
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(asked))
        assert (await link.call(Ping(), timeout_s=5)).name == "found"
        assert len(asked) == 3

    play(story)


def test_other_sources_are_left_alone_while_a_standby_answers(play):
    async def story(stage):
        asked = []

        async def ping(_call, _request, _body):
            asked.append("standby")
            if len(asked) < 5:
                raise NotMaster("no master yet")
            return Pong(role="controller", name="standby", boot_id=b"")

        async def find():
            asked.append("source")
            return ()

        address = await stage.serve("standby", {Ping: ping}, role=Role.CONTROLLER)
        link = MasterLink(await stage.connections("pool"), [address], stage.runtime, find)
        await link.call(Ping(), timeout_s=60)
        assert asked == ["standby"] * 5

    play(story)


def test_a_bucket_is_enough_to_find_the_first_controller(play):
    async def story(stage):
        async def ping(_call, _request, _body):
            return Pong(role="controller", name="found", boot_id=b"")

        address = await stage.serve("found", {Ping: ping}, role=Role.CONTROLLER)

        async def find():
            return (address,)

        link = MasterLink(await stage.connections("pool"), [], stage.runtime, find)
        assert (await link.call(Ping(), timeout_s=60)).name == "found"

    play(story)


async def serve_silent(stage, *names):
    async def silent(_call, _request, _body):
        await trio.sleep_forever()

    return [await stage.serve(name, {Ping: silent}, role=Role.CONTROLLER) for name in names]


async def serve_found(stage):
    async def ping(_call, _request, _body):
        return Pong(role="controller", name="found", boot_id=b"")

    return await stage.serve("found", {Ping: ping}, role=Role.CONTROLLER)


@pytest.mark.parametrize("silent", [1, 3, 8])
def test_other_sources_are_asked_though_no_call_lasts_long_enough_to_try_all(play, silent):
    async def story(stage):
        address = await serve_found(stage)
        asked = []

        async def find():
            asked.append(address)
            return (address,)

        seeds = await serve_silent(stage, *(f"silent {number}" for number in range(silent)))
        link = MasterLink(await stage.connections("pool"), seeds, stage.runtime, find)
        for _ in range(silent + 1):  # Two controllers are tried in ten seconds.
            with suppress(PeerError):
                assert (await link.call(Ping(), timeout_s=10)).name == "found"
        assert link.address == address
        assert len(asked) == 1

    play(story)


def test_a_search_does_not_outlast_the_call(play):
    async def story(stage):
        link = MasterLink(
            await stage.connections("pool"), ["tcp://127.0.0.1:9"], stage.runtime, trio.sleep_forever
        )
        began = trio.current_time()
        with trio.move_on_after(100), pytest.raises(PeerError):
            await link.call(Ping(), timeout_s=5)
        assert trio.current_time() - began < 5.5  # Of the mock clock.

    play(story)


def test_a_search_does_not_lead_away_from_a_master_that_was_told_of_meanwhile(play):
    async def story(stage):
        address = await serve_found(stage)
        asked = []

        async def ping(_call, _request, _body):
            asked.append("another")
            raise NotMaster("no idea")

        another = await stage.serve("another", {Ping: ping}, role=Role.CONTROLLER)

        async def find():
            await trio.sleep(3)
            return (another,)

        link = MasterLink(await stage.connections("pool"), ["tcp://127.0.0.1:9"], stage.runtime, find)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: link.call(Ping(), timeout_s=20))
            await trio.sleep(1)
            link.follow(address, [address])
        assert link.address == address
        assert not asked

    play(story)
