"""What stands in `p.grad` after backward, and that replicas never differ by a bit: with real servers around the model."""

import copy
import gc
import io

import pytest
import torch
from ring import Ring
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ps_accordion.errors import RunAborted, UsageError
from ps_accordion.worker import DistributedModel
from ps_accordion.worker.alone import Alone

EXACT = {"codec.name": "dense", "codec.light": 32, "regime.policy": "static"}
TOPK = {"codec.name": "topk", "codec.light": 0.1, "regime.policy": "static"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    # Where torch notes the model whose forward runs. Forwards in several threads leave one of them there.
    DistributedDataParallel._active_ddp_module = None


def run(settings, work, workers=2):
    """Run `work` in every worker."""
    return Ring({"workers.count": workers, "servers.count": 2, "layout.partition_elements": 1024} | settings).run(work)


def draw(*shape, seed):
    """Return random numbers that depend on nothing else."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0):
    """Fill a module's parameters with random numbers."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=1000 * seed + index) * 0.2)
    return module


def network(norm=False):
    """Return a small network, with batch-norm if asked for."""
    layers = [nn.Linear(20, 64), nn.BatchNorm1d(64) if norm else nn.Identity(), nn.ReLU(), nn.Linear(64, 32)]
    return filled(nn.Sequential(*layers))


def loss_of(model, step, rank, size=8):
    """Return the loss on one worker's batch of one step."""
    seed = 2 * (1000 * step + rank)
    return functional.mse_loss(model(draw(size, 20, seed=seed)), draw(size, 32, seed=seed + 1))


def state(model):
    """Return a copy of all parameters and buffers."""
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def gradients(model):
    """Return a copy of all gradients."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(mine, theirs):
    """Say whether two lists of tensors have the same bits."""
    return all(a is b or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


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


# ---------------------------------------------------------------- uneven data


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("settings", [EXACT, TOPK], ids=["dense", "topk"])
def test_workers_with_different_lengths_end_alike(settings, counted):
    """Three workers, three lengths, two epochs, batch-norm, momentum, a scheduler a step: all bits equal after each epoch."""
    lengths = (2, 5, 4)

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.9)
        session.track(optimizer, scheduler=scheduler)
        after = []
        for epoch in range(2):
            with model.join(divide_by_initial_world_size=counted):
                for step in range(lengths[(session.rank + epoch) % 3]):
                    optimizer.zero_grad()
                    loss_of(model, 10 * epoch + step, session.rank).backward()
                    optimizer.step()
                    scheduler.step()
            momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
            after.append((state(model), momenta, optimizer.param_groups[0]["lr"], scheduler.last_epoch))
        return after

    results = run(settings, work, workers=3)
    for epoch in range(2):
        mine = results[0][epoch]
        for other in results[1:]:
            assert same(mine[0], other[epoch][0])
            assert same(mine[1], other[epoch][1])
            assert mine[2:] == other[epoch][2:]
        assert mine[3] == 5 * (epoch + 1)


@pytest.mark.parametrize("counted", [True, False])
def test_a_missing_gradient_counts_as_zero_or_not_at_all(counted):
    """As `divide_by_initial_world_size` says."""

    def work(session):
        model = DistributedModel(network(), session=session)
        mean = None
        with model.join(divide_by_initial_world_size=counted):
            if session.rank == 0:
                loss_of(model, 0, 0).backward()
                mean = gradients(model)
        assert gradients(model) == [None] * 4
        return mean

    mine = run(EXACT, work)[0]
    alone = network()
    (loss_of(alone, 0, 0) / (2 if counted else 1)).backward()
    for got, expected in zip(mine, gradients(alone), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_worker_without_any_data_takes_over_what_the_others_learned():
    """It has never stepped, so its optimizer has no state at all; training goes on alike."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        session.track(optimizer)
        for epoch in range(2):
            with session.join():
                for step in range(3 if session.rank or epoch else 0):
                    optimizer.zero_grad()
                    loss_of(model, 10 * epoch + step, session.rank).backward()
                    optimizer.step()
        return state(model), [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()]

    results = run(TOPK, work)
    assert same(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


def test_a_worker_that_leaves_while_others_join_does_not_hold_them_up():
    """Two workers go on for an epoch after the third has finished the script."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.track(optimizer)
        for epoch in range(1 if session.rank == 0 else 3):
            with session.join():
                for step in range(2 + session.rank):
                    optimizer.zero_grad()
                    loss_of(model, 10 * epoch + step, session.rank).backward()
                    optimizer.step()
        return state(model)

    results = run(EXACT, work, workers=3)
    assert same(results[1], results[2])


def test_weights_make_the_mean_one_over_samples():
    """Batches of different sizes, weighed by their size: the gradient of the joined batch."""
    sizes = (4, 12)

    def work(session):
        model = DistributedModel(network(), session=session)
        session.weigh(sizes[session.rank])
        loss_of(model, 0, session.rank, size=sizes[session.rank]).backward()
        return gradients(model)

    results = run(EXACT, work)
    assert same(*results)
    alone = network()
    x = torch.cat([draw(size, 20, seed=2 * rank) for rank, size in enumerate(sizes)])
    y = torch.cat([draw(size, 32, seed=2 * rank + 1) for rank, size in enumerate(sizes)])
    functional.mse_loss(alone(x), y).backward()
    for mine, expected in zip(results[0], gradients(alone), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-10, float("nan"), float("inf"), 2e9])
def test_a_weight_that_is_none_is_refused(weight):
    """With the range."""
    from ps_accordion import config

    with Alone(config.load(environment={})) as session, pytest.raises(UsageError, match="from 1e-09 to 1e\\+09"):
        session.weigh(weight)


# ---------------------------------------------------------------- batches of batches


@pytest.fixture
def _batches(monkeypatch):
    """Let the plan ask for three batches a step."""
    from ps_accordion.worker.tracked import Tracked

    monkeypatch.setattr(Tracked, "batch_multiplier", property(lambda _: 3))


@pytest.mark.usefixtures("_batches")
def test_accumulate_takes_as_many_batches_as_the_plan_says_and_scales_the_rate():
    """The rate is higher while the optimizer steps, and as it was afterwards; gradients travel once a step."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rates = []
        optimizer.register_step_post_hook(lambda o, *_: rates.append((o.param_groups[0]["lr"], session.training.rate())))
        session.track(optimizer)
        seen = []
        for batches in session.accumulate(range(8)):
            optimizer.zero_grad()
            seen.append(len(batches))
            for step in batches:
                (loss_of(model, step, session.rank) / len(batches)).backward()
            optimizer.step()
        return seen, rates, optimizer.param_groups[0]["lr"], session.counters.rounds, state(model)

    (result,) = run(EXACT, work, workers=1)
    seen, rates, rate, rounds, final = result
    assert seen == [3, 3]  # what fills no step is left out: rates must be the same in every worker
    assert rates == [(pytest.approx(0.3), 0.1)] * 2
    assert rate == 0.1
    assert rounds == 2
    alone = network()
    for batches in ([0, 1, 2], [3, 4, 5]):
        alone.zero_grad()
        for step in batches:
            (loss_of(alone, step, 0) / len(batches)).backward()
        with torch.no_grad():
            for parameter in alone.parameters():
                parameter -= 0.3 * parameter.grad
    for mine, expected in zip(final, state(alone), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_batches")
def test_a_rate_is_what_it_was_after_a_step_that_failed():
    """And a loader without enough batches for one step is no training in silence."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.track(optimizer)
        optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        steps = session.accumulate(range(3))
        next(steps)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        steps.close()
        with pytest.raises(UsageError, match="at least 3 batches"):
            next(session.accumulate(range(2)))
        return optimizer.param_groups[0]["lr"]

    assert run(EXACT, work, workers=1) == [0.1]


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


# ---------------------------------------------------------------- what must be taken over after a join


def sequence(optimizer):
    """Return a scheduler with schedulers inside, one of which counts its milestones in a dict with numbers for keys."""
    schedulers = torch.optim.lr_scheduler
    inner = [schedulers.LinearLR(optimizer, 0.5, total_iters=2), schedulers.MultiStepLR(optimizer, [1, 3], gamma=0.5)]
    return schedulers.SequentialLR(optimizer, inner, milestones=[2])


@pytest.mark.parametrize(
    ("make", "schedule"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), sequence),
        (lambda p: torch.optim.Adafactor(p, lr=0.1), None),
        (
            lambda p: torch.optim.Adagrad(p, lr=0.1),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
        ),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e)),
    ],
    ids=["nesterov-sequential", "adafactor", "adagrad-onecycle", "tensor-rate-lambda"],
)
def test_optimizers_and_schedulers_of_every_kind_go_on_alike(make, schedule):
    """One worker has no data in the first epoch and all in the second; afterwards rates and parameters have the same bits."""

    def work(session):
        model = DistributedModel(network(), session=session)
        optimizer = make(model.parameters())
        scheduler = schedule(optimizer) if schedule is not None else None
        session.track(optimizer, scheduler=scheduler)
        for epoch in range(2):
            with session.join():
                for step in range(4 if session.rank or epoch else 0):
                    optimizer.zero_grad()
                    loss_of(model, 10 * epoch + step, session.rank).backward()
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
        return state(model), float(optimizer.param_groups[0]["lr"])

    results = run(EXACT, work)
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("what", ["optimizer", "scheduler", "lbfgs"])
def test_what_a_worker_cannot_take_over_ends_the_run_with_its_name(what):
    """Instead of replicas that part in the next epoch."""

    def work(session):
        model = DistributedModel(network(), session=session)
        kind = torch.optim.LBFGS if what == "lbfgs" else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if what == "scheduler" else None
        if what != "optimizer":
            session.track(optimizer)
        with session.join():
            for step in range(2 if session.rank else 0):

                def closure(step=step):
                    optimizer.zero_grad()
                    loss = loss_of(model, step, session.rank)
                    loss.backward()
                    return loss

                if what == "lbfgs":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
                if scheduler is not None:
                    scheduler.step()

    ring = Ring({"workers.count": 2, "servers.count": 1} | EXACT)
    with pytest.raises((UsageError, RunAborted)):
        ring.run(work)
    said = {"optimizer": "session.track", "scheduler": "session.track", "lbfgs": "LBFGS"}[what]
    assert any(said in str(error) for error in ring.errors)


def test_half_accumulated_gradients_do_not_outlive_a_join():
    """They differ between workers, and would make replicas part at the next step."""

    def work(session):
        model = DistributedModel(network(norm=True), session=session)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.track(optimizer)
        for epoch in range(2):
            with session.join():
                for step in range(5 + session.rank):
                    loss_of(model, 10 * epoch + step, session.rank).backward()
                    if step % 4 == 3:
                        optimizer.step()
                        optimizer.zero_grad()
                with torch.no_grad():
                    loss_of(model, 99, session.rank)  # moves the running statistics, and no round carries them
        loss_of(model, 77, session.rank).backward()
        optimizer.step()
        return state(model)

    assert same(*run(EXACT, work))


def test_windows_in_steps_go_on_over_a_join():
    """Rounds without this worker count, so its reports name the same windows, of the same rounds, as the others'."""

    def work(session):
        model = DistributedModel(network(), session=session)
        tracked, reports = model._gradients.tracked, []
        send = tracked._report
        tracked._report = lambda report: (reports.append(report), send(report))
        for epoch in range(4):
            with session.join():
                for step in range(3 + session.rank):
                    loss_of(model, 10 * epoch + step, session.rank).backward()
                    model.zero_grad()
        return [(report.window, report.round) for report in reports if report is not None]

    # Four rounds and the JOIN an epoch.
    assert run(EXACT | {"regime.window": "5 steps"}, work) == [[(0, 4), (1, 9), (2, 14), (3, 19)]] * 2


def test_buffers_of_double_precision_are_left_alone():
    """Rounds carry float32, and would round them."""

    def work(session):
        module = network()
        module.register_buffer("exact", torch.tensor([1 / 3, 1e300], dtype=torch.float64))
        model = DistributedModel(module, session=session)
        loss_of(model, 0, session.rank).backward()
        return module.exact.tolist()

    assert run(EXACT, work) == [[1 / 3, 1e300]] * 2


def test_a_parameter_in_two_wrapped_models_is_refused():
    """The rounds of one would overwrite the gradient of the other."""
    from ps_accordion import config

    with Alone(config.load(environment={})) as session:
        module = network()
        first = DistributedModel(module, session=session)
        with pytest.raises(UsageError, match="another wrapped model"):
            DistributedModel(nn.Sequential(module[0]), session=session)
        del first
        gc.collect()
        DistributedModel(module, session=session)


def test_each_model_reports_the_rate_of_its_own_optimizer():
    """Two models of one session, two rates."""

    def work(session):
        models = [DistributedModel(network(), session=session) for _ in range(2)]
        for model, rate in zip(models, (0.5, 0.01), strict=True):
            optimizer = torch.optim.SGD(model.parameters(), lr=rate)
            session.track(optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1))
            session.track(optimizer)
        assert all(stepper.scheduler is not None for stepper in session.training.steppers)
        return [model._gradients.tracked.rate() for model in models]

    assert run(EXACT, work, workers=1) == [[0.5, 0.01]]
