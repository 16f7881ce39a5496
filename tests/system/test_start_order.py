"""Start order never matters: whoever is early waits, and says where it looks only when it has waited long enough."""

import itertools
import threading

import pytest
import torch

from ps_accordion import config
from ps_accordion.codecs import warm
from ps_accordion.coordinator import loop as coordinator_loop
from ps_accordion.selection import used
from ps_accordion.server.loop import Server
from ps_accordion.wire.transport import Transport
from ps_accordion.worker.session import Session


class Heard:
    """Sockets that tell when they are first used: a role that has said something is up, and has nobody to talk to."""

    def __init__(self):
        self.spoke = threading.Event()
        self.transport = Transport(outgoing=self._note)

    def _note(self, peer, frames):
        self.spoke.set()
        return [(peer, frames)]


@pytest.mark.parametrize("order", list(itertools.permutations(["coordinator", "server", "worker"])), ids="-".join)
def test_roles_may_start_in_any_order(tmp_path, order):
    """Each starts when the one before has begun to talk; the run is the same."""
    settings = config.load(
        environment={},
        overrides={
            "coordinator.address": f"ipc://{tmp_path}/c",
            "servers.bind": f"ipc://{tmp_path}/s{{number}}",
            "workers.count": 1,
            "servers.count": 1,
            "timeouts.join": 30,
            "codec.name": "dense",
        },
    )
    warm(used(settings.codec))
    outcome = {}

    def coordinator(sockets, up):
        outcome["coordinator"] = coordinator_loop.run(settings, transport=sockets.transport, listening=lambda _: up.set())

    def server(sockets, up):
        outcome["server"] = Server(settings, 0, transport=sockets.transport).run()

    def worker(sockets, up):
        with Session(settings, rank=0, threads=1, transport=sockets.transport) as session:
            outcome["worker"] = session.push_pull(torch.full((4, 4), 3.0), name="x").sum().item()

    roles = {"coordinator": coordinator, "server": server, "worker": worker}
    threads = []
    for name in order:
        sockets = Heard()
        up = sockets.spoke if name != "coordinator" else threading.Event()
        thread = threading.Thread(target=roles[name], args=(sockets, up), name=name)
        thread.start()
        threads.append(thread)
        assert up.wait(20), name
    for thread in threads:
        thread.join()
    assert outcome == {"coordinator": 0, "server": 0, "worker": 48.0}
