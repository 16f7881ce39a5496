"""Leaving a run while the others go on, with nothing lost: the residual goes into the sum before the worker does.

    between two steps ──FLUSH pushes──> that round is decided ──account, leave──> the coordinator has it in its log ──> gone
                            ^──────── it was skipped, or this worker was taken out and came in again ────┘

From then on the worker pushes EMPTY, so the others wait for nothing until a view is without it. A worker that dies on the way
loses what it has not handed over, as at any death.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ps_accordion.errors import PsAccordionError

from .client import Client
from .exchange import Exchange

if TYPE_CHECKING:
    from .session import Session

__all__ = ["hand_over", "leave_with"]

GOODBYE_S = 3.0
"""How long a worker that failed waits for the coordinator to know."""


def hand_over(session: Session, exchanges: Sequence[Exchange]) -> bool:
    """Hand over the residuals of all layouts, and wait until the coordinator lets this worker go.

    Args:
        session: Of this worker; no round is open.
        exchanges: The layouts.

    Returns:
        False where the rounds have ended for all meanwhile: there is nobody to leave.

    Raises:
        PsAccordionError: The run has failed.
    """
    client, membership = session.client, session.client.membership
    while True:
        session.take_part()
        for exchange in exchanges:
            client.run(exchange.flush)
        client.wait(
            lambda: membership.over or all(exchange.rounds.idle != "FLUSH" for exchange in exchanges),
            "the round with this worker's residual",
        )
        if membership.over or (exchanges and all(exchange.rounds.ended for exchange in exchanges)):
            return False
        flushed = [(exchange.number, exchange.flushed) for exchange in exchanges]
        rounds = [(number, round_) for number, round_ in flushed if round_ is not None]
        if len(rounds) == len(flushed):
            break  # else this worker was taken out in the middle
    client.codecs.drain()
    account = client.accounting.close(exchanges)
    client.call(lambda: client.carry(account))
    client.call(lambda: membership.leave_others(rounds))
    client.wait(lambda: membership.released or membership.gone, "the coordinator's goodbye")
    client.events.write(event="left", flushed=rounds)
    return True


def leave_with(client: Client, error: BaseException) -> None:
    """Tell the coordinator that this worker has failed, and how; wait a little until it knows."""
    membership = client.membership
    code = error.exit_code if isinstance(error, PsAccordionError) else 1
    text = f"worker {membership.slot} ended with {type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        text = f"worker {membership.slot} ended with exit code {code}"
    client.call(lambda: membership.leave(text, max(1, code & 0xFF)))
    deadline = time.monotonic() + GOODBYE_S
    while not membership.gone and time.monotonic() < deadline:
        client.notice(0.05)
