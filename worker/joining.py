"""The end of a `join` block: wait for those that have more data, then take over what they have learned.

    out of data ──JOINED pushes──> every worker is out of data: JOIN ──> who came early fetches the state of one of the last

Optimizer, scheduler and scaler are part of that state: a worker that sat out some steps would else go on with an old momentum,
and its parameters would drift away from all others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import snapshot

if TYPE_CHECKING:
    from .base import BaseSession
    from .exchanging import Exchanging
    from .gradients import Gradients

__all__ = ["joined"]


def joined(
    session: BaseSession, models: Sequence[Gradients], exchanges: Sequence[Exchanging], *, divide_by_initial_world_size: bool
) -> None:
    """Wait until every worker has come here with these layouts, and make their states equal.

    Args:
        session: This worker's session.
        models: Models whose state counts.
        exchanges: Layouts that take part; those of the models among them.
        divide_by_initial_world_size: Whether this worker's missing gradients count as zero in the mean.
    """
    if session.closed:
        return  # this worker has left the run within the block
    for exchange in exchanges:
        exchange.join(divide_by_initial_world_size=divide_by_initial_world_size)
    for model in models:
        model.settle()
    donors = {id(exchange): exchange.wait_for_join() for exchange in exchanges}
    for model in models:
        module, donor = model.module, donors[id(model.tracked)]
        if module is None or donor is None:
            continue
        number = session.exchanges.index(model.tracked)
        if donor == session.slot:
            session.hand_out(number, snapshot.take(module, session.training))
        else:
            snapshot.apply(session.fetch(number, donor), module, session.training)
            model.agree()
