"""A worker's session, with real servers around it."""

import json

import numpy as np
import pytest
import torch
from ring import Ring

from ps_accordion.errors import UsageError

EXACT = {"codec.name": "dense", "codec.light": 32, "regime.policy": "static"}


def run(settings, work, workers=2):
    """Run `work` in every worker."""
    return Ring({"workers.count": workers, "servers.count": 1} | settings).run(work)


def test_push_pull_gives_the_mean_in_place():
    """Every worker gets the same bits, in its own tensor, round after round, for several names."""

    def work(session):
        tensor = torch.empty(50, 40)
        means = []
        for round_ in range(3):
            for name in ("a", "b"):
                tensor.fill_(float(10 * round_ + session.rank + (name == "b")))
                assert session.push_pull(tensor, name=name) is tensor
                means.append(tensor.unique().tolist())
        return means

    results = run(EXACT, work, workers=4)
    assert all(result == [[1.5], [2.5], [11.5], [12.5], [21.5], [22.5]] for result in results)


def test_push_pull_of_what_is_not_finite_is_nan_everywhere():
    """Also in the partitions that were finite, so that all workers hold the same."""

    def work(session):
        tensor = torch.ones(100, 100)
        if session.rank == 1:
            tensor[0, 0] = float("inf")
        session.push_pull(tensor, name="x")
        again = session.push_pull(torch.ones(100, 100), name="x")
        return bool(torch.isnan(tensor).all()), again.sum().item(), session.counters.skipped_rounds

    for all_nan, total, skipped in run(EXACT | {"layout.partition_elements": 1024}, work):
        assert all_nan
        assert skipped == 1
        # The finite parts of the skipped round were taken back into residuals and come now: delayed, not lost.
        assert total > 100 * 100


@pytest.mark.parametrize("tensor", [torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4).t()[:2]])
def test_push_pull_refuses_what_it_cannot_take(tensor):
    """With the type and what to do."""

    def work(session):
        with pytest.raises(UsageError, match=r"contiguous float32"):
            session.push_pull(tensor, name="x")

    run(EXACT, work, workers=1)


def test_what_a_script_logs_stands_in_the_metrics_of_its_step(tmp_path):
    """One line a round, with bytes, times, and the values that the script gave after the step."""

    def work(session):
        tensor = torch.ones(64, 64)
        for round_ in range(4):
            session.push_pull(tensor, name="x")
            session.log(loss=0.5 + round_, accuracy=round_ / 10)
        return session.counters

    counters = run(EXACT | {"run.directory": str(tmp_path)}, work)
    for rank in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"metrics-worker-{rank}.jsonl").read_text().splitlines()]
        assert [(line["round"], line["loss"], line["accuracy"]) for line in lines] == [
            (round_, 0.5 + round_, round_ / 10) for round_ in range(4)
        ]
        assert sum(line["push_bytes"] for line in lines) == counters[rank].push_bytes
        assert sum(line["pull_bytes"] for line in lines) == counters[rank].pull_bytes
        assert all(line["push_bytes"] > line["dense_bytes"] == 4 * 64 * 64 for line in lines)
        assert all(line["step_s"] >= line["wait_s"] > 0 for line in lines)


def test_a_sampler_that_is_tracked_marks_epochs():
    """`set_epoch` still does what it did, and ends the window: a plan follows."""

    class Sampler:
        def __init__(self):
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    def work(session):
        sampler = Sampler()
        optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        session.track(optimizer, sampler=sampler)
        rng = np.random.default_rng(session.rank)
        tensor = torch.empty(64, 64)
        plan = None
        # A plan takes some time to come, and these rounds are short; it comes to all workers in the same round.
        for epoch in range(500):
            sampler.set_epoch(epoch)
            for _ in range(4):
                tensor.copy_(torch.from_numpy(rng.standard_normal((64, 64))))
                session.push_pull(tensor, name="x")
            plan = session._exchanges[0].exchange.rounds.plan
            if plan is not None and not plan.critical[0]:
                break
        return sampler.epochs, plan

    settings = {"codec.name": "topk", "regime.window": "1 epoch", "regime.interval": 1}
    (epochs, plan), (other_epochs, other_plan) = run(settings, work)
    assert epochs == other_epochs == list(range(len(epochs)))
    assert plan == other_plan
    assert not plan.critical[0]
