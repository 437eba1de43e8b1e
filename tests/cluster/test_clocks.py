"""The clocks of machines jump by an hour, forth and back: nobody who works with droppex notices."""

import threading
import time

import pytest
import trio

from tests.cluster.clocks import LIBRARIES
from tests.cluster.conftest import wait_for
from tests.cluster.test_failovers import Saboteur, Workload, check, engine_of


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES, reason="needs Debian's libfaketime")
@pytest.mark.parametrize("engine", ["etcd", "sqlite"])
def test_clocks_that_jump_by_an_hour_change_nothing(new_cluster, tmp_path, clocks, engine):
    def prepare(cluster):
        for process in cluster.processes:
            clocks.give(process)

    controller = {"heartbeat": "500ms", "down_after": "3s"}
    with (
        engine_of(engine, tmp_path) as catalog,
        new_cluster(
            pools=4, controllers=3, prepare=prepare, catalog=catalog, controller=controller
        ) as cluster,
    ):
        wait_for(lambda: len(cluster.controllers().controllers) == 3, "not all controllers are known")
        workload = Workload(cluster.app.addresses["app"], seed=3)
        saboteur = Saboteur(cluster, seed=3, promotes=engine == "sqlite")
        clients = threading.Thread(target=trio.run, args=[workload.run])
        clients.start()
        try:
            for shift in ("+3600", "-3600"):
                time.sleep(1)
                other = "-3600" if shift == "+3600" else "+3600"
                for number, process in enumerate(cluster.processes):
                    clocks.set(process, shift if number % 2 else other)
                time.sleep(2)
                saboteur.fail_over()  # To one whose clock is two hours off.
            for process in cluster.processes:
                clocks.set(process, "+0")
            time.sleep(2)
        finally:
            workload.over = True
            clients.join()
        created_ms = [cluster.describe(name).created_ms for name in workload.kept]
        check(cluster, workload)
    hour_ms, now_ms = 3_600_000, time.time() * 1000
    # The clocks did jump: files say so.
    assert any(one > now_ms + hour_ms / 2 for one in created_ms)
    assert any(one < now_ms - hour_ms / 2 for one in created_ms)
