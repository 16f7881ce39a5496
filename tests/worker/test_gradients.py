"""What stands in `p.grad` after backward, and that replicas never differ by a bit: with real servers around the model."""

import copy
import io

import pytest
import torch
from ring import Ring
from steps import EXACT, TOPK, draw, filled, gradients, loss_of, network, run, same, state
from torch import nn

from ps_accordion.errors import RunAborted, UsageError
from ps_accordion.worker import DistributedModel

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- several backwards, gradients that are not zeroed


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("settings", [EXACT, TOPK], ids=["dense", "topk"])
def test_a_second_backward_adds_its_mean_to_the_first(settings, views):
    """As under DistributedDataParallel: two synchronised backwards without zero_grad leave the sum of two means."""

    def work(session):
        model = DistributedModel(network(), session=session, gradient_as_bucket_view=views)
        loss_of(model, 0, session.rank).backward()
        first = gradients(model)
        loss_of(model, 1, session.rank).backward()
        both = gradients(model)
        model.zero_grad()
        loss_of(model, 2, session.rank).backward()
        return first, both, gradients(model)

    results = run(settings, work)
    for mine, theirs in zip(*results, strict=True):
        assert same(mine, theirs)
    if settings is EXACT:
        alone = network()
        for step, seen in ((0, results[0][0]), (1, results[0][1])):
            for rank in range(2):
                (loss_of(alone, step, rank) / 2).backward()
            for mine, expected in zip(seen, gradients(alone), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_a_mean_that_the_script_has_clipped_is_not_sent_again():
    """What stands in p.grad when the next backward begins stays as the script has left it, and the new mean comes on top."""

    def work(session):
        model = DistributedModel(network(), session=session)
        loss_of(model, 0, session.rank).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        clipped = gradients(model)
        loss_of(model, 1, session.rank).backward()
        return clipped, gradients(model)

    (clipped, both), theirs = run(EXACT, work)
    assert same(both, theirs[1])
    alone = network()
    for rank in range(2):
        (loss_of(alone, 1, rank) / 2).backward()
    for base, mine, expected in zip(clipped, both, gradients(alone), strict=True):
        torch.testing.assert_close(mine - base, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [True, False])
def test_gradients_set_to_zero_instead_of_none_train_alike(views):
    """With momentum, and a branch that one worker leaves out."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 32), nn.Linear(20, 32)

        def forward(self, x, both):
            return self.a(x) + self.b(x) if both else self.a(x)

    def work(session):
        results = []
        for set_to_none in (True, False):
            model = DistributedModel(filled(Two()), session=session, find_unused_parameters=True, gradient_as_bucket_view=views)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(6):
                optimizer.zero_grad(set_to_none=set_to_none)
                x = draw(8, 20, seed=step + 100 * session.rank)
                model(x, both=(step + session.rank) % 3 == 0).square().mean().backward()
                optimizer.step()
            results.append(state(model))
        return results

    mine, theirs = run(EXACT, work)
    assert same(mine[0], theirs[0])
    assert same(mine[1], theirs[1])
    for none, zero in zip(*mine, strict=True):
        torch.testing.assert_close(none, zero, rtol=1e-6, atol=1e-7)


def test_local_gradients_on_top_of_an_old_mean_are_refused_by_name():
    """The mean and a local gradient in one tensor could not be told apart any more."""

    def work(session):
        model = DistributedModel(network(), session=session)
        loss_of(model, 0, session.rank).backward()
        with model.no_sync():
            loss_of(model, 1, session.rank).backward()

    ring = Ring({"workers.count": 1, "servers.count": 1} | EXACT)
    with pytest.raises((UsageError, RunAborted), match=r"no_sync\(\).*zero_grad"):
        ring.run(work)


def test_zeroed_gradients_may_be_accumulated_under_no_sync():
    """Zeros are no mean; what was accumulated is sent by the next synchronised backward."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(0, 9, 3):
            optimizer.zero_grad(set_to_none=False)
            with model.no_sync():
                loss_of(model, step, session.rank).backward()
                loss_of(model, step + 1, session.rank).backward()
            loss_of(model, step + 2, session.rank).backward()
            optimizer.step()
        return state(model)

    results = run(EXACT, work)
    assert same(*results)
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for step in range(0, 9, 3):
        optimizer.zero_grad()
        for part in range(3):
            for rank in range(2):
                (loss_of(alone, step + part, rank) / 2).backward()
        optimizer.step()
    for mine, expected in zip(results[0], state(alone), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("settings", [EXACT, TOPK], ids=["dense", "topk"])
def test_an_overflow_in_one_worker_skips_the_step_in_all(settings):
    """Scales back off alike, parameters and momentum keep the same bits, and what was not finite never comes back."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        session.track(optimizer, scaler=scaler)
        scales, before_and_after = [], []
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, step, session.rank)
            if step in (2, 7) and session.rank == 1:
                loss = loss * torch.tensor(float("inf"))
            before = state(model)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            before_and_after.append(same(before, state(model)))
        return scales, before_and_after, state(model), session.counters.skipped_rounds

    mine, theirs = run(settings, work)
    assert mine[0] == theirs[0]
    assert mine[0] == [1024.0, 1024.0, 512.0, 512.0, 512.0, 1024.0, 1024.0, 512.0, 512.0, 512.0]
    assert mine[1] == theirs[1] == [step in (2, 7) for step in range(10)]
    assert same(mine[2], theirs[2])
    assert mine[3] == 2
    assert all(torch.isfinite(tensor).all() for tensor in mine[2])


def test_a_scaler_changes_nothing_but_the_scale():
    """With the tracked scaler the same parameters come out as without any, to the bit: scales are powers of two."""

    def work(session):
        results = []
        for scaled in (False, True):
            model = DistributedModel(network(), session=session)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            scaler = torch.amp.GradScaler("cpu", enabled=scaled)
            session.track(optimizer, scaler=scaler)
            for step in range(5):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step, session.rank)).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append(state(model))
        return results

    for plain, scaled in run(EXACT, work):
        assert same(plain, scaled)


# ---------------------------------------------------------------- what has changed since the model was wrapped


@pytest.mark.parametrize("change", ["unfreeze", "replace", "add"])
def test_a_changed_parameter_set_is_refused_at_the_next_forward(change):
    """Instead of training that parameter in every worker on its own."""

    def work(session):
        module = network()
        module[0].bias.requires_grad_(False)
        model = DistributedModel(module, session=session)
        loss_of(model, 0, session.rank).backward()
        if change == "unfreeze":
            module[0].bias.requires_grad_(True)
        elif change == "replace":
            module[3].weight = nn.Parameter(torch.zeros(32, 64))
        else:
            module[3].extra = nn.Linear(3, 3)
        loss_of(model, 1, session.rank)

    ring = Ring({"workers.count": 1, "servers.count": 1} | EXACT)
    with pytest.raises((UsageError, RunAborted), match="wrap"):
        ring.run(work)


def test_the_learning_rate_of_an_optimizer_that_nobody_tracked_is_known_after_its_first_step():
    """It steps parameters of a model of this session; others are left out."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=7.0)
        for step in range(2):
            loss_of(model, step, session.rank).backward()
            optimizer.step()
            other.step()
            optimizer.zero_grad()
        return session.training.rate()

    assert run(EXACT, work, workers=1) == [0.125]


def test_an_error_of_one_worker_ends_a_join_in_all():
    """Nobody waits for a worker that is gone."""

    def work(session):
        model = DistributedModel(network(), session=session)
        with model.join():
            if session.rank == 1:
                raise ZeroDivisionError("the true cause")

    ring = Ring({"workers.count": 2, "servers.count": 1} | EXACT)
    with pytest.raises((ZeroDivisionError, RunAborted), match="the true cause"):
        ring.run(work)
    assert all("the true cause" in str(error) for error in ring.errors)


# ---------------------------------------------------------------- our own state


@pytest.mark.parametrize("servers", [1, 3])
def test_residuals_are_saved_and_loaded_onto_another_number_of_servers(servers):
    """What compression has left out stands in the worker's own state, by tensor, and counts again where it is loaded."""
    saved = {}

    def first(session):
        model = DistributedModel(network(), session=session)
        for step in range(3):
            loss_of(model, step, session.rank).backward()
            model.zero_grad()
        saved[session.rank] = session.state_dict()

    def second(session):
        DistributedModel(network(), session=session)
        assert session.state_dict() == {}
        session.load_state_dict(saved[session.rank])
        return session.state_dict()

    run(TOPK, first)
    loaded = run(TOPK | {"servers.count": servers}, second)
    for rank, state_ in enumerate(loaded):
        assert set(state_) == set(saved[rank])
        assert "0.0.weight" in state_
        assert all(torch.equal(tensor, saved[rank][name]) for name, tensor in state_.items())
    assert not torch.equal(loaded[0]["0.0.weight"], loaded[1]["0.0.weight"])


@pytest.mark.parametrize(
    "state_", [{"7.0.weight": torch.zeros(1)}, {"0.0.weight": torch.zeros(3)}, {"0.no": torch.zeros(3)}, {"x": torch.zeros(1)}]
)
def test_a_state_of_another_model_is_refused(state_):
    """With the name that does not fit."""

    def work(session):
        DistributedModel(network(), session=session)
        session.load_state_dict(state_)

    ring = Ring({"workers.count": 1, "servers.count": 1} | TOPK)
    with pytest.raises((UsageError, RunAborted), match=next(iter(state_)).partition(".")[2] or "x"):
        ring.run(work)


def test_gradients_asked_for_in_between_change_nothing():
    """`torch.autograd.grad` adds nothing to p.grad, so nothing is set aside for it."""

    def work(session):
        model = DistributedModel(network(), session=session)
        loss_of(model, 0, session.rank).backward()
        before = gradients(model)
        torch.autograd.grad(loss_of(model, 1, session.rank), list(model.parameters()))
        return same(before, gradients(model))

    assert run(EXACT, work) == [True, True]


@pytest.mark.parametrize("way", ["retained graph", "two forwards", "inner module"])
def test_a_backward_that_nobody_else_would_know_of_is_refused_by_name(way):
    """DistributedDataParallel keeps such gradients to itself, and replicas part in silence."""

    def work(session):
        model = DistributedModel(network(), session=session)
        if way == "retained graph":
            loss = loss_of(model, 0, session.rank)
            loss.backward(retain_graph=True)
            loss.backward()
        elif way == "two forwards":
            first, second = loss_of(model, 0, session.rank), loss_of(model, 1, session.rank)
            first.backward()
            second.backward()
        else:
            loss_of(model.module, 0, session.rank).backward()

    ring = Ring({"workers.count": 1, "servers.count": 1} | EXACT)
    with pytest.raises((UsageError, RunAborted), match="second synchronising backward"):
        ring.run(work)


def test_after_the_session_the_model_is_the_scripts_own():
    """Who goes on with it alone may."""

    def work(session):
        model = DistributedModel(network(), session=session)
        loss_of(model, 0, session.rank).backward()
        return model

    (model,) = run(EXACT, work, workers=1)
    before = model.module[0].bias.grad.clone()
    loss_of(model.module, 1, 0).backward()
    assert not torch.equal(before, model.module[0].bias.grad)


def test_the_model_inside_can_be_copied_and_pickled():
    """As an average of weights does it; the copy has nothing to do with the run."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        loss_of(model, 0, session.rank).backward()
        twin = copy.deepcopy(model.module)
        buffer = io.BytesIO()
        torch.save(model.module, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        loss_of(twin, 1, session.rank).backward()
        twin.load_state_dict(loaded.state_dict())
        return same(state(loaded), state(model.module))

    assert run(EXACT, work) == [True, True]
