"""Momentum that workers give gradients before they are compressed (dgc): what a training script sees of it."""

import pytest
import torch
from ring import Ring
from steps import TOPK, loss_of, network, run, same
from torch import nn

from ps_accordion.errors import RunAborted, UsageError
from ps_accordion.worker import DistributedModel

pytestmark = pytest.mark.usefixtures("one_thread")
DGC = TOPK | {"codec.name": "dgc", "codec.small_bits": 32}


def test_where_nothing_is_left_out_it_is_the_momentum_of_sgd():
    """Small tensors go dense: each parameter moves as with an optimizer that has the momentum."""
    torch.manual_seed(1)
    start = nn.Linear(20, 30).state_dict()  # here: workers are threads, which would draw from one generator in turn

    def work(session):
        alone = nn.Linear(20, 30)
        alone.load_state_dict(start)
        model = DistributedModel(nn.Linear(20, 30), session=session)
        model.module.load_state_dict(alone.state_dict())
        ours = torch.optim.SGD(model.parameters(), lr=0.1)
        theirs = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
        session.track(ours)
        for step in range(6):
            batches = [torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in range(2)]
            ours.zero_grad()
            model(batches[session.rank]).square().mean().backward()
            ours.step()
            theirs.zero_grad()
            sum(alone(batch).square().mean() / 2 for batch in batches).backward()
            theirs.step()
        return [(a.detach().clone(), b.detach().clone()) for a, b in zip(model.parameters(), alone.parameters(), strict=True)]

    mine, its = run(DGC, work)
    assert same([a for a, _ in mine], [a for a, _ in its])
    for ours, theirs in mine:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["tracked first", "tracked later", "never tracked"])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_an_optimizer_with_momentum_of_its_own_is_refused(when, kind):
    """As soon as it is known, with what to do; with momentum on top of momentum a step would be ten times too long."""

    def work(session):
        inner = network()
        make = {"SGD": lambda: torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)}
        optimizer = make.get(kind, lambda: torch.optim.Adam(inner.parameters()))()
        if when == "tracked first":
            session.track(optimizer)
        model = DistributedModel(inner, session=session)
        if when == "tracked later":
            session.track(optimizer)
        loss_of(model, 0, session.rank).backward()
        optimizer.step()

    ring = Ring({"workers.count": 1, "servers.count": 1} | DGC)
    with pytest.raises((UsageError, RunAborted), match=rf"without momentum for '0.weight'.*got {kind} with 0.9: set momentum=0"):
        ring.run(work)


def test_momentum_of_other_tensors_is_the_optimizers_business():
    """By the row of `codec.tensors`; and none at all is refused where dgc has none."""

    def work(session):
        model = DistributedModel(network(), session=session)
        named = dict(model.module.named_parameters())
        session.track(torch.optim.SGD([named.pop("0.weight")], lr=0.1))
        session.track(torch.optim.SGD(named.values(), lr=0.1, momentum=0.9))
        loss_of(model, 0, session.rank).backward()
        exchange = session.exchanges[0].exchange
        return {exchange.layout.tensors[coder.key.tensor].name for coder in exchange.coders if coder.moves}

    rows = TOPK | {"codec.tensors": '{"0.weight" = "dgc"}'}
    assert run(rows, work) == [{"0.weight"}] * 2
    assert run(rows | {"codec.momentum": 0.0}, work) == [set()] * 2


def test_what_a_script_wants_the_mean_of_has_no_momentum():
    """`push_pull` says mean, whatever the job's codec."""

    def work(session):
        return [session.push_pull(torch.full((5,), 1.0 + session.rank), name="x").clone() for _ in range(3)]

    for means in run(DGC, work):
        assert all(torch.equal(mean, torch.full((5,), 1.5)) for mean in means)


def test_velocities_are_saved_and_loaded_onto_another_number_of_servers():
    """By tensor, beside residuals; under a codec that leaves momentum to the optimizer they are refused."""
    saved = {}

    def first(session):
        model = DistributedModel(network(), session=session)
        for step in range(3):
            loss_of(model, step, session.rank).backward()
            model.zero_grad()
        saved[session.rank] = session.state_dict()

    def second(session):
        DistributedModel(network(), session=session)
        session.load_state_dict(saved[session.rank])
        return session.state_dict()

    run(DGC, first)
    assert {"0.0.weight", "velocity.0.0.weight", "velocity.0.0.bias"} <= saved[0].keys()
    for rank, state in enumerate(run(DGC | {"servers.count": 3}, second)):
        assert state.keys() == saved[rank].keys()
        assert all(torch.equal(tensor, saved[rank][name]) for name, tensor in state.items())
    saved[0] = {name: tensor for name, tensor in saved[0].items() if name.startswith("velocity.0.0.weight")}
    with pytest.raises(
        (UsageError, RunAborted), match=r"expected no momentum of '0.weight'.*leave out the entries that begin with"
    ):
        Ring({"workers.count": 1, "servers.count": 1} | TOPK).run(second)
