"""A worker that is about to leave, or has left, and whoever comes in meanwhile."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from machines import gaussian, layout_of, settings_of
from steps import EXACT, TOPK, gradients, loss_of, network, run, same

from ps_accordion.errors import UsageError
from ps_accordion.wire import messages as m
from ps_accordion.wire.lending import Lending
from ps_accordion.worker import DistributedModel
from ps_accordion.worker.host_exchange import HostExchange
from ps_accordion.worker.rounds import Decide

pytestmark = pytest.mark.usefixtures("one_thread")


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
        transport=SimpleNamespace(lending=Lending()),
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


def test_who_is_taken_out_when_it_has_finished_knows_that_the_others_go_on():
    """It has nothing to come back for. But that its rounds have ended says nothing of theirs, and it must not say so."""
    settings = settings_of()
    membership, transport = SimpleNamespace(slot=0, incarnation=1), SimpleNamespace(lending=Lending())
    client = SimpleNamespace(settings=settings, membership=membership, transport=transport)
    exchange = HostExchange(client, 0, layout_of(settings), lambda decision, timing: None)
    assert not exchange.rounds.alone
    exchange.rounds.idle = "EMPTY"
    exchange.on_view(m.View(2, [(1, 2)], [(0, 0, 0)], [], [], 1, [(0, 1, 0, 0)]), 0.0, member=False)
    assert exchange.rounds.ended
    assert exchange.rounds.alone


@pytest.mark.parametrize(("used", "current"), [((0, 0), True), ((0, 1), False)])
def test_a_round_that_nobody_used_makes_nobody_lag_behind(used, current):
    """Beside one that hands over its residual, those that wait in join() may be all that have the state."""
    exchange = object.__new__(HostExchange)
    exchange._open, exchange.current, exchange.behind, exchange.starting = None, True, False, False
    exchange._coders, exchange._timing, exchange._decided = [], None, lambda *_: None
    exchange.rounds = SimpleNamespace(idle="JOINED", ended=True)
    exchange._end(Decide(7, "DATA", used, ()))
    assert exchange.has_state == current


def ask(session):
    """Do what SIGTERM does, in a worker that is a thread here."""
    session._interrupts.asked = True


def test_a_worker_that_is_asked_to_leave_finishes_a_step_of_several_batches_first():
    """What it has accumulated under no_sync would else be lost, and no ledger would know of it."""

    def work(session):
        model = DistributedModel(network(), session=session)
        with model.no_sync():
            for batch in range(2):
                loss_of(model, batch, session.rank).backward()
                if session.rank == 1:
                    ask(session)
        loss_of(model, 2, session.rank).backward()
        mean = gradients(model)
        if session.rank == 1:
            with pytest.raises(SystemExit):
                loss_of(model, 3, 1)
            assert session.closed
        return mean

    assert same(*run(EXACT, work))


def test_who_has_left_waits_for_nobody_and_is_told_where_it_would():
    """The end of a join block, and whatever the others would have to take part in."""

    def work(session):
        with pytest.raises(UsageError, match=r"leave\(\) was called before a model was wrapped"):
            session.leave()
        model = DistributedModel(network(), session=session)
        with session.join():
            for step in range(3):
                loss_of(model, step, session.rank).backward()
                model.zero_grad()
                session.push_pull(torch.ones(3), name="known")
                if session.rank == 1:
                    session.leave()
                    break
        if session.rank == 1:
            with model.no_sync():
                loss_of(model, 9, 1).backward()  # its own affair
            model.zero_grad()
            loss = loss_of(model, 9, 1)
            for call in (
                loss.backward,
                session.checkpoint,
                lambda: session.push_pull(torch.ones(3), name="known"),
                lambda: session.push_pull(torch.ones(3), name="new"),
            ):
                with pytest.raises(UsageError, match="after this worker had left its session"):
                    call()

    run(TOPK, work)


def test_a_worker_that_is_asked_to_leave_after_its_last_step_does_not_wait_for_the_others():
    """Whoever sent SIGTERM will not wait, either. The others have steps to make, which begin when it has gone."""

    def work(session):
        model = DistributedModel(network(), session=session)
        with session.join():
            for step in range(2 + session.rank):
                loss_of(model, step, session.rank).backward()
                model.zero_grad()
        if session.rank == 1:
            ask(session)
            return
        with session.join():
            while len(session.members) > 1:
                loss_of(model, 9, 0).backward()
                model.zero_grad()

    run(TOPK, work)


def test_all_workers_may_be_asked_to_leave_after_the_last_step():
    """A cluster that is shut down asks all at once."""

    def work(session):
        model = DistributedModel(network(), session=session)
        loss_of(model, 0, session.rank).backward()
        ask(session)

    run(TOPK, work)
