"""Uneven data: `join`, weights, steps of several batches, and what is taken over at the end."""

import gc

import pytest
import torch
from ring import Ring
from steps import EXACT, TOPK, draw, gradients, loss_of, network, run, same, state
from torch import nn
from torch.nn import functional

from ps_accordion.errors import RunAborted, UsageError
from ps_accordion.worker import DistributedModel
from ps_accordion.worker.alone import Alone

pytestmark = pytest.mark.usefixtures("one_thread")


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
