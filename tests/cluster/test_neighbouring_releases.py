"""Daemons that speak another version of the protocol: neighbours work together, others are refused by name."""

import sys

import pytest

from droppexd.model import CHUNK_SIZE
from droppexd.wire.messages import PROTOCOL_VERSION
from tests.cluster.conftest import Process

LARGE = CHUNK_SIZE + 5000


def droppexd_that_speaks(version):
    """Return the command of this release as if it spoke another version."""
    code = (
        f"import runpy, droppexd.wire.codec as codec; codec.PROTOCOL_VERSION = {version}; "
        "runpy.run_module('droppexd', run_name='__main__', alter_sys=True)"
    )
    return (sys.executable, "-c", code)


def let_speak_newer(*processes):
    for process in processes:
        process.command = droppexd_that_speaks(PROTOCOL_VERSION + 1)


@pytest.mark.slow
@pytest.mark.parametrize("newer", ["controllers", "some pools", "app"])
def test_roles_of_neighbouring_releases_work_together(new_cluster, content, newer):
    def prepare(cluster):
        chosen = {"controllers": [cluster.controller], "some pools": cluster.pools[:2], "app": [cluster.app]}
        let_speak_newer(*chosen[newer])

    with new_cluster(pools=4, prepare=prepare) as cluster:
        cluster.wait_until_up()
        data = content(LARGE)
        cluster.put("docs/large", data)
        cluster.put("docs/small", data[:1000])
        assert cluster.get("docs/large") == data
        assert cluster.get("docs/small") == data[:1000]
        cluster.remove("docs/small")
        assert cluster.names() == ["docs/large"]


@pytest.mark.slow
def test_a_pool_of_a_far_release_is_refused_in_one_line_on_both_sides(new_cluster, wait_until):
    with new_cluster(pools=3) as cluster:
        far = Process(cluster.folder, "far", ["pool"], [], command=droppexd_that_speaks(PROTOCOL_VERSION + 2))
        far.spawn()
        try:
            said = (
                f"protocol versions {PROTOCOL_VERSION + 2} and {PROTOCOL_VERSION} do not work together: "
                f"upgrade the side that speaks {PROTOCOL_VERSION}, one release at a time"
            )
            for process in (cluster.controller, far):
                wait_until(lambda log=process.log: said in log.read_text(), f"{process.name} does not say it")
            assert f"{cluster.controller.address}: {said}" in far.log.read_text()
            assert far.running
        finally:
            far.kill()
        assert {pool.name for pool in cluster.status().pools} == {"pool-1", "pool-2", "pool-3"}
        cluster.put("docs/a", b"content")
        assert cluster.get("docs/a") == b"content"
