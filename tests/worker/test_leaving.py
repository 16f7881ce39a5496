"""A worker that is about to leave, and whoever comes in meanwhile."""

from types import SimpleNamespace

from ps_accordion.worker.host_exchange import HostExchange


def test_who_hands_over_its_residual_still_hands_out_its_state():
    """Others that come in may have nobody else to ask: without them the round with the residual is never through."""
    exchange = object.__new__(HostExchange)
    exchange._open = None
    for idle, stands in ((None, False), ("JOINED", False), ("FLUSH", True), ("EMPTY", True)):
        exchange.rounds = SimpleNamespace(idle=idle)
        assert exchange.stands == stands, idle
