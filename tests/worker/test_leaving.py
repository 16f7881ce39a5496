"""A worker that is about to leave, and whoever comes in meanwhile."""

from types import SimpleNamespace

import numpy as np
import pytest
from machines import gaussian, layout_of, settings_of

from ps_accordion.worker.host_exchange import HostExchange
from ps_accordion.worker.rounds import Decide


def test_who_hands_over_its_residual_still_hands_out_its_state():
    """Others that come in may have nobody else to ask: without them the round with the residual is never through."""
    exchange = object.__new__(HostExchange)
    exchange._open = None
    for idle, stands in ((None, False), ("JOINED", False), ("FLUSH", True), ("EMPTY", True)):
        exchange.rounds = SimpleNamespace(idle=idle)
        assert exchange.stands == stands, idle


def test_a_residual_that_was_handed_over_where_nobody_trains_has_counted():
    """The shard keeps it. If that round is made again without this worker, so much is lost, and is an item."""
    settings = settings_of()
    client = SimpleNamespace(
        settings=settings,
        membership=SimpleNamespace(slot=0, incarnation=1),
        record=SimpleNamespace(push=lambda push, payload: None),
        carry=lambda actions: None,
    )
    layout = layout_of(settings)
    exchange = HostExchange(client, 0, layout, lambda decision, timing: None)
    for coder in exchange.coders:
        coder.set_residual(gaussian(coder.key.elements, coder.key.number))
        coder.flush(round_=0, previous_skipped=False, weight=1.0)
    exchange.rounds.idle = "FLUSH"
    exchange._end(Decide(0, "DATA", (0,) * len(layout.keys), ()))
    assert exchange.rounds.idle == "EMPTY"
    for coder in exchange.coders:
        assert coder.account.uncounted() == pytest.approx(np.linalg.norm(gaussian(coder.key.elements, coder.key.number)))
