"""Running statistics follow the lowest rank, in every round and to the bit."""

import pytest
import torch
from steps import EXACT, TOPK, gradients, loss_of, network, run, same, state

from ps_accordion.worker import DistributedModel

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- buffers


def test_batch_norm_follows_the_lowest_rank():
    """After every backward all workers have the running statistics of rank 0, and a skipped round changes none."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, step, session.rank)
            if step == 3 and session.rank == 0:
                loss = loss * float("nan")
            loss.backward()
            optimizer.step()
            seen.append([model.module[1].running_mean.clone(), model.module[1].running_var.clone()])
        return seen, state(model)

    (mine, final), (theirs, other) = run(TOPK, work)
    assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))
    assert same(final, other)
    assert same(mine[2], mine[3])
    assert not same(mine[3], mine[4])
    alone = network(norm=True)
    with torch.no_grad():
        loss_of(alone, 0, 0)
    torch.testing.assert_close(mine[0][0], alone[1].running_mean, rtol=0, atol=0)


def test_buffers_stay_local_when_the_script_says_so():
    """`broadcast_buffers=False`, as under DistributedDataParallel."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session, broadcast_buffers=False)
        loss_of(model, 0, session.rank).backward()
        return model.module[1].running_mean.clone()

    mine, theirs = run(EXACT, work)
    assert not torch.equal(mine, theirs)


def test_statistics_that_nobody_changed_are_not_sent():
    """In evaluation mode they stand still: the round costs a header."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        model.eval()
        loss_of(model, 0, session.rank).backward()
        return model._gradients.tracked.exchange.rounds.lead, state(model)

    results = run(EXACT, work)
    assert [lead for lead, _ in results] == [0, 0]
    assert same(results[0][1], results[1][1])


def test_a_constant_with_infinities_is_no_reason_to_skip():
    """The mask of an attention stands in the state_dict of some models: it is copied at the start, and never sent."""

    def work(session):
        module = network(norm=True)
        module.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        model = DistributedModel(module, session=session)
        loss_of(model, 0, session.rank).backward()
        return session.counters.skipped_rounds, gradients(model)[0] is not None

    assert run(EXACT, work) == [(0, True)] * 2


def test_loaded_buffers_survive_a_skipped_round():
    """What `load_state_dict` brings is what all workers agree on from then on."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        saved = {name: tensor + 1 if "running" in name else tensor for name, tensor in model.module.state_dict().items()}
        model.load_state_dict(saved)
        (loss_of(model, 0, session.rank) * float("nan")).backward()
        return model.module[1].running_mean.clone()

    for mean in run(EXACT, work):
        assert torch.equal(mean, torch.ones(64))


def test_buffers_of_double_precision_are_left_alone():
    """Rounds carry float32, and would round them."""

    def work(session):
        module = network()
        module.register_buffer("exact", torch.tensor([1 / 3, 1e300], dtype=torch.float64))
        model = DistributedModel(module, session=session)
        loss_of(model, 0, session.rank).backward()
        return module.exact.tolist()

    assert run(EXACT, work) == [[1 / 3, 1e300]] * 2


def test_zeros_of_another_sign_follow_too():
    """They compare equal, and are other bits; a sum at the server knows one zero only, and all workers take that."""

    def work(session):
        module = network(norm=True)
        model = DistributedModel(module, session=session)
        loss_of(model, 0, session.rank).backward()
        with torch.no_grad():
            module[1].running_mean.fill_(-0.0 if session.rank == 0 else 0.0)
        module.eval()
        loss_of(model, 1, session.rank).backward()
        if session.rank:
            with torch.no_grad():
                module[1].running_mean.fill_(0.0)
        loss_of(model, 2, session.rank).backward()
        return torch.signbit(module[1].running_mean).tolist()

    mine, theirs = run(EXACT, work)
    assert mine == theirs
