"""A cluster grows from one machine to six, and its files follow: coded anew while they are read."""

import json
import shutil
from functools import partial

import pytest
import trio

from droppexd.errors import DroppexError
from droppexd.model import CHUNK_SIZE, EXTENT_CHUNKS, Layout
from droppexd.wire.messages import ANYTHING

SETTINGS = {"controller": {"heartbeat": "300ms", "down_after": "2s", "delete_grace": "1s"}}
EXTENT = CHUNK_SIZE * EXTENT_CHUNKS

pytestmark = pytest.mark.usefixtures("no_leftovers")


def add_pools(cluster, count):
    """Start pools on machines of their own, and wait until the app knows them."""
    added = []
    for number in range(len(cluster.pools) + 1, len(cluster.pools) + count + 1):
        pool = cluster._process(f"pool-{number}", "pool")
        pool.options += ["--machine", pool.name]
        added.append(pool)
    cluster.pools += added
    for pool in added:
        pool.start()
    cluster.wait_until_up()


def layouts(cluster, name):
    return [str(extent.layout) for extent in cluster.describe(name).extents]


def at_rest(cluster):
    status = cluster.status()
    return not (status.repair.left or status.repair.moving or status.garbage)


def raw(cluster):
    """Return the bytes of all large shards in all folders."""
    return sum(file.stat().st_size for pool in cluster.pools for file in (pool.data / "large").glob("*/*"))


def relayout(cluster, *arguments, code=0):
    return cluster.droppex("relayout", *arguments, code=code)


@pytest.mark.slow
def test_files_follow_a_cluster_that_grows_from_one_machine_to_six(new_cluster, content, wait_until):
    with new_cluster(pools=1, **SETTINGS) as cluster:
        cluster.pools[0].restart()
        cluster.wait_until_up()
        stored = {f"docs/{number}": content(700_000 + number, number) for number in range(6)}
        stored |= {"docs/empty": b"", "docs/tiny": content(10), "docs/big": content(3 * CHUNK_SIZE + 77, 9)}
        for name, data in stored.items():
            cluster.put(name, data)
        cluster.droppex("cp", "docs/big", "docs/copy")
        stored["docs/copy"] = stored["docs/big"]
        assert set(layouts(cluster, "docs/1")) == {"1+0"}
        assert "nothing to do: all of it has its layout" in relayout(cluster).stdout

        for more, large, small in ((2, "2+1", "1+1"), (3, "4+2", "1+2")):
            add_pools(cluster, more)
            wait_until(
                lambda layout=large: (
                    cluster.put("docs/new", content(600_000), condition=ANYTHING).layout == layout
                ),
                "new files are not stored as wide",
            )
            wait_until(lambda: at_rest(cluster), "what was replaced is not cleared away")
            before = raw(cluster)
            (first,) = json.loads(relayout(cluster, "docs/1", "--json").stdout)
            assert (first["layout"], first["changed"]) == (large, len(stored["docs/1"]))
            told = {one["name"]: one for one in json.loads(relayout(cluster, "--json").stdout)}
            assert set(told) == {*stored, "docs/new"}
            assert [told["docs/big"]["changed"] + told["docs/copy"]["changed"]] == [len(stored["docs/big"])]
            assert told["docs/1"]["changed"] == told["docs/empty"]["changed"] == 0
            assert told["docs/0"]["layout"] == large
            for name, data in stored.items():
                assert cluster.get(name) == data, name
                if data:
                    assert set(layouts(cluster, name)) == {small if name == "docs/tiny" else large}
            wait_until(lambda: at_rest(cluster), "the old shards are not cleared away")
            saved = sum(one["before"] - one["after"] for one in (first, *told.values()))
            assert raw(cluster) == pytest.approx(before - saved, rel=0.01)
            assert "nothing to do" in relayout(cluster).stdout

        assert cluster.describe("docs/0").survives_machines == 2
        copies = relayout(cluster, "docs/", "--layout", "1+2")
        assert "of disk more" in copies.stdout
        kept = relayout(cluster, "docs/big", "--layout", "1+3")
        assert "1 file coded anew" in kept.stdout
        assert "1 file of a layout that survives more losses kept it" in relayout(cluster, "docs/big").stdout
        for name, data in stored.items():
            assert cluster.get(name) == data, name


def test_what_is_no_file_or_no_layout_is_refused_in_one_line(new_cluster, content):
    with new_cluster(pools=3, **SETTINGS) as cluster:
        cluster.put("docs/one", content(300_000))
        assert "docs/none" in relayout(cluster, "docs/none", code=3).stderr
        assert "there is nothing below this folder" in relayout(cluster, "none/", code=3).stderr
        assert "K+M" in relayout(cluster, "--layout", "seven", code=2).stderr
        assert "survive" in relayout(cluster, "docs/one", "--layout", "3+0", code=2).stderr
        refused = relayout(cluster, "docs/one", "--layout", "4+2", code=5)
        assert "4+2 takes 6 pools, and 3 take writes now" in refused.stderr
        assert layouts(cluster, "docs/one") == ["2+1"]


@pytest.mark.slow
def test_a_relayout_goes_on_where_it_was_killed_and_readers_notice_nothing(new_cluster, content, wait_until):
    with new_cluster(pools=6, **SETTINGS) as cluster:
        data = (content(1_000_003) * 310)[: EXTENT + 9 * CHUNK_SIZE + 123]
        cluster.put("docs/big", data, layout=Layout(1, 1))

        async def scenario(client):
            async with trio.open_nursery() as nursery, client.open_read("docs/big") as download:
                parts = aiter(download)
                head = [frame for _ in range(2) for frame in await anext(parts)]

                async def begin():
                    try:
                        await client.relayout("docs/big", layout=Layout(4, 2))
                    except DroppexError:  # The app is killed.
                        return

                nursery.start_soon(begin)
                while len(set(layouts_of(await client.describe("docs/big")))) < 2:
                    await trio.sleep(0.02)
                # The reader goes on with extents that are garbage by now.
                rest = [frame async for frames in parts for frame in frames]
                assert b"".join([*head, *rest]) == data
                cluster.app.kill()
                nursery.cancel_scope.cancel()

        def layouts_of(described):
            return [str(extent.layout) for extent in described.extents]

        cluster.run(scenario)
        cluster.app.start()
        done = relayout(cluster, "docs/big", "--layout", "4+2", "--json")
        (last,) = json.loads(done.stdout)
        assert last["changed"] <= 9 * CHUNK_SIZE + 123  # The first extent was not coded again.
        assert set(layouts(cluster, "docs/big")) == {"4+2"}
        assert cluster.get("docs/big") == data
        wait_until(lambda: at_rest(cluster), "what the killed app began is not cleared away")
        assert raw(cluster) == pytest.approx(len(data) * 6 / 4, rel=0.05)


@pytest.mark.slow
def test_a_file_of_which_a_part_was_coded_anew_is_found_by_its_shards_alone(
    new_cluster, content, wait_until, droppexd
):
    with new_cluster(pools=3, **SETTINGS) as cluster:  # On one machine: there is no journal.
        data = (content(1_000_003) * 280)[: EXTENT + 3 * CHUNK_SIZE + 5]
        cluster.put("docs/big", data, layout=Layout(1, 1))
        small = content(300_000)
        cluster.put("docs/small", small, layout=Layout(1, 1))

        async def begin(client):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(client.relayout, "docs/big", layout=Layout(2, 1)))
                while (await client.describe("docs/big")).extents[0].layout != Layout(2, 1):
                    await trio.sleep(0.01)
                cluster.app.kill()
                nursery.cancel_scope.cancel()

        cluster.run(begin)
        cluster.app.start()
        assert relayout(cluster, "docs/small", "--layout", "2+1").returncode == 0
        wait_until(lambda: at_rest(cluster), "the old shards are not cleared away")
        assert set(layouts(cluster, "docs/big")) == {"2+1", "1+1"}
        cluster.controller.kill()
        shutil.rmtree(cluster.controller.data)
        named = [argument for pool in cluster.pools for argument in ("--from-pools", pool.address)]
        droppexd("catalog", "rebuild", *named, "--data", cluster.controller.data, code=0)
        cluster.controller.start()
        cluster.wait_until_up()
        wait_until(
            lambda: sorted(cluster.names()) == ["lost+found/docs/big", "lost+found/docs/small"],
            lambda: f"not all is found: {cluster.names()} {cluster.droppex('orphans').stdout}",
        )
        assert cluster.get("lost+found/docs/big") == data
        assert cluster.get("lost+found/docs/small") == small
