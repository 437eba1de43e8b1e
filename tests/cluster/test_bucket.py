"""Pools and an app that know nothing but a bucket find the controllers, with real processes."""

import json

import pytest

from droppexd.bucket import read_signing_key, sign, verify

SETTINGS = {"controller": {"heartbeat": "500ms", "down_after": "3s"}}


@pytest.fixture
def bucket(tmp_path, droppexd):
    """The options of a bucket: for those that read it, and for the controller that writes it."""
    made = droppexd("bucket-key", tmp_path / "bucket.key", code=0)
    public = made.stdout.split('bucket_key = "')[1].split('"')[0]
    share = tmp_path / "share"
    share.mkdir()
    reading = ["--bucket", f"file://{share}/droppex.json", "--bucket-key", public]
    return (
        share / "droppex.json",
        reading,
        [*reading, "--bucket-signing-key", str(tmp_path / "bucket.key")],
    )


def test_a_bucket_leads_to_the_controllers_and_a_wrong_one_is_told_of(
    new_cluster, bucket, content, wait_until
):
    file, reading, writing = bucket
    nobody = ["--controller", "tcp://127.0.0.1:1"]

    def prepare(cluster):
        cluster.controller.options += writing
        for process in (*cluster.pools, cluster.app):
            process.options += [*reading, *nobody]

    data = content(200_000)
    with new_cluster(pools=3, prepare=prepare, **SETTINGS) as cluster:
        cluster.put("docs/one", data)
        says = json.loads(json.loads(file.read_text())["says"])
        assert says["master"] == cluster.controller.address
        pool = cluster.pools[0]
        # Another's signature, and a term that is over: a line in the log, and the search goes on.
        good = file.read_bytes()
        file.write_bytes(good.replace(b'"signature": "', b'"signature": "00'))
        pool.kill()
        pool.spawn()
        wait_until(lambda: "no such document" in pool.log.read_text() or
                   "signature is wrong" in pool.log.read_text(), "a wrong signature is not told of")  # fmt: skip
        file.write_bytes(good)
        pool.wait_until_ready()
        cluster.controller.restart()  # Another term, which all have seen.
        wait_until(
            lambda: json.loads(json.loads(file.read_text())["says"])["term"] > says["term"], "no new term"
        )
        file.write_bytes(good)
        cluster.wait_until_up()
        cluster.controller.kill()
        wait_until(lambda: "and there has been a master of term" in cluster.app.log.read_text(), old_term)
        cluster.controller.start()
        assert cluster.get("docs/one") == data
        cluster.wait_until_up()


def old_term():
    return "a bucket of a term that is over is not told of"


@pytest.mark.slow
def test_another_clusters_bucket_is_refused_and_one_is_written_once_its_share_is_back(
    new_cluster, bucket, content, tmp_path, wait_until
):
    file, reading, writing = bucket

    def prepare(cluster):
        cluster.controller.options += writing
        for process in (*cluster.pools, cluster.app):
            process.options += [*reading, "--controller", "tcp://127.0.0.1:1"]

    data = content(200_000)
    with new_cluster(pools=3, prepare=prepare, **SETTINGS) as cluster:
        cluster.put("docs/one", data)
        pool = cluster.pools[0]
        good = file.read_bytes()
        public = bytes.fromhex(reading[-1])
        told = verify(good, public)
        secret = read_signing_key(tmp_path / "bucket.key", public)
        file.write_bytes(sign(told._replace(cluster_id=bytes(16), term=told.term + 9), secret))
        pool.kill()
        pool.spawn()
        wait_until(lambda: "it is of another cluster" in pool.log.read_text(), "it is not told of")
        assert cluster.get("docs/one") == data
        file.write_bytes(good)
        pool.wait_until_ready()
        away = file.parent.rename(tmp_path / "away")
        cluster.controller.restart()
        wait_until(lambda: "is not up to date" in cluster.controller.log.read_text(), "it is not told of")
        away.rename(file.parent)
        wait_until(lambda: verify(file.read_bytes(), public).term > told.term, "it is not written again")
        cluster.wait_until_up()
        assert cluster.get("docs/one") == data


def test_a_controller_whose_key_nobody_would_believe_does_not_start(bucket, droppexd, tmp_path):
    _, reading, _ = bucket
    droppexd("bucket-key", tmp_path / "other.key", code=0)
    ended = droppexd(
        "--role", "controller", "--listen", "tcp://127.0.0.1:0", "--data", tmp_path / "data",
        *reading, "--bucket-signing-key", tmp_path / "other.key", code=2,
    )  # fmt: skip
    assert "nobody would believe what" in ended.stderr
