"""What a master makes known of itself, and goes on making known."""

from types import SimpleNamespace

import trio

from droppexd.model import Role
from droppexd.roles.controller_peers import Peers
from droppexd.wire.group_messages import TellMaster
from droppexd.wire.messages import Done

ADDRESS = "tcp://127.0.0.1:7700"


def peers_of(stage, connections, publish, pools=()):
    catalogue = SimpleNamespace(
        cluster_id=bytes(16),
        term=3,
        controllers={},
        pools={number: SimpleNamespace(address=address, membership=None) for number, address in pools},
        sessions={},
    )

    async def save(record):
        await trio.lowlevel.checkpoint()
        catalogue.controllers[record.name] = record

    catalogue.save_controller = save
    return Peers(
        catalogue=catalogue,
        front=SimpleNamespace(address=ADDRESS),
        connections=connections,
        clock=stage.runtime.clock,
        check_term=lambda: None,
        group=SimpleNamespace(),
        publish=publish,
    )


def test_what_could_not_be_published_is_tried_until_it_is(play):
    async def story(stage):
        told = []

        async def publish(cluster_id, term, controllers):
            await trio.lowlevel.checkpoint()
            told.append((cluster_id, term, tuple(controllers)))
            return len(told) > 3

        peers = peers_of(stage, await stage.connections("master"), publish)
        stage.nursery.start_soon(peers.run)
        await trio.sleep(300)
        assert told == [(bytes(16), 3, (ADDRESS,))] * 4
        await peers._save("other", "tcp://127.0.0.1:7710")
        await trio.sleep(300)
        assert told[4:] == [(bytes(16), 3, (ADDRESS, "tcp://127.0.0.1:7710"))]

    play(story)


def test_nobody_waits_to_be_told_until_that_is_published(play):
    async def story(stage):
        heard = []

        async def tell_master(_call, request, _body):
            heard.append(request.address)
            return Done()

        async def publish(*_):
            await trio.sleep_forever()

        pool = await stage.serve("pool", {TellMaster: tell_master})
        peers = peers_of(stage, await stage.connections("master", Role.CONTROLLER), publish, [(1, pool)])
        stage.nursery.start_soon(peers.run)
        await trio.sleep(1)
        assert heard == [ADDRESS]

    play(story)
