"""The wrapped model, with real servers around it."""

import threading

import numpy as np
import pytest
import torch
from ring import Ring
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ps_accordion.errors import JoinRefused, PsAccordionError, RunAborted, UsageError
from ps_accordion.worker import DistributedModel

EXACT = {"codec.name": "dense", "codec.light": 32, "regime.policy": "static"}
DRAWING = threading.Lock()
TOPK = {"codec.name": "topk", "codec.light": 0.1, "regime.policy": "static"}


pytestmark = pytest.mark.usefixtures("one_thread")


class Branches(nn.Module):
    """A network with a branch that a step may leave out."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(20, 64)
        self.left = nn.Linear(64, 32)
        self.right = nn.Linear(64, 32)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, x, branch="both"):
        """Run the branches asked for."""
        hidden = torch.relu(self.trunk(x))
        out = 0
        if branch in ("left", "both"):
            out = out + self.left(hidden)
        if branch in ("right", "both"):
            out = out + self.right(hidden) * self.scale
        return out


def batch(step, rank, size=8):
    """Return the inputs of one worker in one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 20, generator=generator), torch.randn(size, 32, generator=generator)


def parameters(model):
    """Return a copy of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(mine, theirs):
    """Say whether two lists of tensors have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def run(settings, work, workers=2):
    """Run `work` in every worker."""
    return Ring({"workers.count": workers, "servers.count": 2, "layout.partition_elements": 1024} | settings).run(work)


def build(seed):
    """Return a model with parameters of its own."""
    # The generator that modules draw from belongs to the process, and workers are threads here.
    with DRAWING, torch.random.fork_rng():
        torch.manual_seed(seed)
        return Branches()


def step_of(model, optimizer, step, rank, **kwargs):
    """Make one training step."""
    x, y = batch(step, rank)
    optimizer.zero_grad()
    loss = functional.mse_loss(model(x, **kwargs), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_dense_training_equals_one_process_on_the_joined_batch(workers):
    """With dense float32 the workers together make the steps of a single process, to float tolerance, and all the same bits."""

    def work(session):
        model = DistributedModel(build(session.rank), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        session.track(optimizer)
        for step in range(10):
            step_of(model, optimizer, step, session.rank)
        return parameters(model)

    results = run(EXACT, work, workers)
    assert all(same(results[0], other) for other in results[1:])
    alone = build(0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for step in range(10):
        parts = [batch(step, rank) for rank in range(workers)]
        optimizer.zero_grad()
        functional.mse_loss(alone(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts])).backward()
        optimizer.step()
    for mine, theirs in zip(results[0], parameters(alone), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_all_start_from_the_state_of_the_lowest_rank():
    """Parameters, frozen ones and buffers too, whatever each worker built."""

    def work(session):
        module = build(session.rank + 5)
        with torch.no_grad():
            module.frozen.fill_(float(session.rank))
            module.scale.fill_(10.0 + session.rank)
        model = DistributedModel(module, session=session)
        return [*parameters(model), model.module.scale.clone()]

    results = run(TOPK, work, workers=3)
    expected = build(5)
    with torch.no_grad():
        expected.frozen.fill_(0.0)
    assert all(same(results[0], other) for other in results[1:])
    assert same(results[0], [*parameters(expected), torch.tensor([10.0])])


def test_a_large_state_arrives_whole():
    """More parts than are in flight at a time."""

    def work(session):
        with DRAWING, torch.random.fork_rng():
            torch.manual_seed(session.rank)
            module = nn.Linear(2000, 1500)
        model = DistributedModel(module, session=session)
        return [parameter.double().sum().item() for parameter in model.parameters()], model.module.weight.detach()[
            ::97, ::89
        ].clone()

    results = run(TOPK | {"layout.partition_elements": 1 << 18}, work, workers=3)
    assert all(results[0][0] == other[0] and torch.equal(results[0][1], other[1]) for other in results[1:])


def test_branches_that_differ_by_worker_leave_the_same_gradients_everywhere():
    """A parameter that anyone used has the aggregate in every worker; one that nobody used has None in every worker."""
    plan = [("left", "right"), ("left", "left"), ("both", "right"), ("right", "right"), ("both", "both"), ("left", "both")]

    def work(session):
        model = DistributedModel(build(0), session=session, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        seen = []
        for step, branches in enumerate(plan):
            x, y = batch(step, session.rank)
            optimizer.zero_grad()
            functional.mse_loss(model(x, branch=branches[session.rank]), y).backward()
            seen.append({name: parameter.grad is not None for name, parameter in model.module.named_parameters()})
            optimizer.step()
        return seen, parameters(model)

    results = run(EXACT, work)
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    for branches, seen in zip(plan, results[0][0], strict=True):
        assert seen["left.weight"] == seen["left.bias"] == bool({"left", "both"} & set(branches))
        assert seen["right.weight"] == seen["right.bias"] == bool({"right", "both"} & set(branches))
        assert seen["trunk.weight"]
        assert not seen["frozen"]


def test_no_sync_accumulates_and_the_next_backward_sends_the_sum():
    """As under DistributedDataParallel: the mean is over workers, not over micro-batches."""

    def work(session):
        model = DistributedModel(build(0), session=session)
        before = session.counters.rounds
        with model.no_sync():
            x, y = batch(0, session.rank)
            functional.mse_loss(model(x), y).backward()
        assert session.counters.rounds == before
        x, y = batch(1, session.rank)
        functional.mse_loss(model(x), y).backward()
        assert session.counters.rounds == before + 1
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    results = run(EXACT, work)
    assert same(*results)
    alone = build(0)
    for rank in range(2):
        for step in range(2):
            x, y = batch(step, rank)
            (functional.mse_loss(alone(x), y) / 2).backward()
    for mine, parameter in zip(results[0], [p for p in alone.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [EXACT, TOPK])
def test_a_skipped_round_leaves_no_gradient_and_replicas_stay_identical(settings):
    """One worker's infinity: every gradient is None everywhere, and training goes on with the same bits."""

    def work(session):
        model = DistributedModel(build(0), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        none = []
        for step in range(8):
            x, y = batch(step, session.rank)
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            if step in (0, 4) and session.rank == 1:
                loss = loss * float("inf")
            loss.backward()
            none.append([parameter.grad is None for parameter in model.parameters() if parameter.requires_grad])
            optimizer.step()
        return none, parameters(model), session.counters.skipped_rounds

    results = run(settings, work)
    assert same(results[0][1], results[1][1])
    assert [all(step) for step in results[0][0]] == [step in (0, 4) for step in range(8)]
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2] == 2
    assert all(np.isfinite(parameter.numpy()).all() for parameter in results[0][1])


def test_state_dict_has_the_prefix_that_users_expect():
    """`module.` in front, as under DistributedDataParallel; `model.module.state_dict()` is without."""

    def work(session):
        model = DistributedModel(build(0), session=session)
        return list(model.state_dict()), list(model.module.state_dict())

    names, inner = run(TOPK, work, workers=1)[0]
    assert names == [f"module.{name}" for name in inner]


def test_a_worker_that_finishes_early_does_not_hold_up_the_others():
    """Its pushes are empty and weigh nothing, until all have finished."""

    def work(session):
        model = DistributedModel(build(0), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = [step_of(model, optimizer, step, 0) for step in range(3 if session.rank else 9)]
        return len(losses), parameters(model)

    results = run(EXACT, work)
    assert [count for count, _ in results] == [9, 3]
    alone = build(0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(9):
        step_of(alone, optimizer, step, 0)
    for mine, theirs in zip(results[0][1], parameters(alone), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_two_models_train_in_one_session():
    """A layout and a round counter each."""

    def work(session):
        first = DistributedModel(build(session.rank), session=session)
        second = DistributedModel(nn.Linear(20, 32), session=session)
        one = torch.optim.SGD(first.parameters(), lr=0.1)
        two = torch.optim.SGD(second.parameters(), lr=0.1)
        for step in range(6):
            step_of(first, one, step, session.rank)
            if step % 2:
                step_of(second, two, step, session.rank)
        return parameters(first) + parameters(second)

    results = run(TOPK, work)
    assert same(*results)


def test_different_models_are_refused_with_both_shapes():
    """Every worker learns which tensor differs, and how."""

    def work(session):
        DistributedModel(nn.Linear(20, 32 + session.rank), session=session)

    ring = Ring({"workers.count": 2, "servers.count": 1})
    with pytest.raises((JoinRefused, RunAborted), match="different models"):
        ring.run(work)
    said = " ".join(str(error) for error in ring.errors)
    assert "(32, 20)" in said
    assert "(33, 20)" in said


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.Linear(4, 4, dtype=torch.complex64), {}, "complex"),
        (nn.SyncBatchNorm(4), {}, "SyncBatchNorm"),
        (nn.Linear(4, 4), {"process_group": object()}, "process_group"),
    ],
)
def test_what_cannot_work_is_refused_by_name(module, options, said):
    """At once, before anything is sent."""
    with pytest.raises(UsageError, match=said):
        DistributedModel(module, session=None, **options)


class Checkpointed(nn.Module):
    """Layers that are computed again in backward, each in a backward of its own inside the outer one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))
        self.last = nn.Linear(20, 32)

    def forward(self, x):
        """Run every layer under reentrant checkpointing."""
        x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.last(x)


def test_reentrant_checkpointing_with_several_buckets_trains():
    """The callback that hands out gradients comes at the end of the outer backward."""

    def work(session):
        with DRAWING, torch.random.fork_rng():
            torch.manual_seed(0)
            module = Checkpointed()
        model = DistributedModel(module, session=session, bucket_cap_mb=0.001)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            step_of(model, optimizer, step, session.rank)
        return parameters(model)

    results = run(TOPK, work)
    assert same(*results)


def test_parameters_that_the_parent_ignores_are_left_out():
    """They are no keys, so no round waits for them."""

    def work(session):
        module = build(0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["left.weight", "left.bias"])
        model = DistributedModel(module, session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            step_of(model, optimizer, step, session.rank)
        return [tensor.name for tensor in model._gradients.tracked.layout.tensors]

    for names in run(EXACT, work):
        assert names == ["trunk.weight", "trunk.bias", "right.weight", "right.bias", "*buffers*"]


def test_gradients_that_are_no_views_of_buckets_get_the_aggregate_too():
    """A branch used at one worker only, with zeroed gradients and no views: the same gradients everywhere."""

    def work(session):
        model = DistributedModel(build(0), session=session, find_unused_parameters=True, gradient_as_bucket_view=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            x, y = batch(step, session.rank)
            optimizer.zero_grad(set_to_none=False)
            branch = "both" if step == 0 or session.rank == 0 else "right"
            functional.mse_loss(model(x, branch=branch), y).backward()
            optimizer.step()
        return parameters(model)

    results = run(EXACT, work)
    assert same(*results)


def test_a_failure_between_two_models_of_one_backward_ends_it():
    """The first is decided, the second waits: the failure reaches it, and the run ends with the true cause."""

    class TrueCause(PsAccordionError):
        pass

    def work(session):
        first = DistributedModel(nn.Linear(20, 32), session=session)
        second = DistributedModel(nn.Linear(20, 16), session=session)
        exchange = second._gradients.tracked.exchange
        exchange.on_result = lambda result, frames, loan: session.client.fail(TrueCause("the true cause"))
        x, _ = batch(0, session.rank)
        (first(x).sum() + second(x).sum()).backward()

    ring = Ring({"workers.count": 2, "servers.count": 1} | EXACT)
    with pytest.raises(PsAccordionError):
        ring.run(work)
    assert any("the true cause" in str(error) for error in ring.errors)
    assert not any("Unable to cast" in str(error) for error in ring.errors)
