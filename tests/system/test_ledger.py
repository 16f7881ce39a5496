"""Nothing vanishes: what was pushed is applied, or still in a residual, or itemised as lost. On both sides."""

import json

import numpy as np
import pytest
from recorded import TABLE, assert_replay_agrees, assert_replicas_agree, load_gradients, run, train
from suites import usually

from ps_accordion.regimes import Choice, Policy, registry
from ps_accordion.regimes.base import Decision

STEPS = 50
LADDER = (
    Choice("topk", 0.1),
    Choice("topk", 0.005),
    Choice("random_block", 0.1),
    Choice("dense", 32.0),
    Choice("topk", 0.02),
    Choice("dense", 16.0),
    Choice("random_block", 0.02),
)


class Cycle(Policy):
    """Takes the next codec and level of a ladder in every window, another one for every tensor."""

    def window(self, window):
        """Move every tensor on by one."""
        choices = tuple(LADDER[(window.index + tensor) % len(LADDER)] for tensor in range(self.tensors))
        return Decision(choices, (True,) * self.tensors, f"window {window.index}")

    def rate(self, rate, round_):
        """Learning rates change nothing."""
        return


@pytest.mark.parametrize("rule", usually(["keep", "clip", "reset"], "clip"))
def test_pushed_is_applied_plus_residuals_plus_itemised_loss(tmp_path, monkeypatch, rule):
    """Over 50 steps while level and codec change, with skipped rounds in between."""
    monkeypatch.setattr(
        registry,
        "_BUILDERS",
        {**registry._BUILDERS, "cycle": lambda settings, light, heavy: Cycle(light=light, heavy=heavy)},
    )

    def work(session):
        return train(session, rounds=STEPS, gradient=sometimes_bad)

    more = {"regime.policy": "cycle", "regime.window": "3 steps", "codec.residual_at_switch": rule}
    results, settings = run(tmp_path, 3, 2, "topk", work=work, **more)
    layout = results[0][0]
    assert_replicas_agree(results)
    replay = assert_replay_agrees(tmp_path, settings, layout, rounds=STEPS)
    used_codecs = {str(np.load(file)["codec"]) for file in (tmp_path / "record" / "worker-0").glob("result-*.npz")}
    assert used_codecs == {"dense", "topk", "random_block"}

    encoded = {where: np.zeros(residual.size) for where, residual in replay.worker.items()}
    for round_ in range(STEPS):
        for (slot, number), (vector, used) in load_gradients(tmp_path, 3, layout.keys, round_).items():
            if np.isfinite(vector).all():
                counted = vector.astype(np.float64)
                for part in layout.keys[number].elements_of(used):
                    counted[part.offset : part.offset + part.length] = 0
                encoded[slot, number] += counted
    for (slot, number), gradients in encoded.items():
        where = slot, number
        right = replay.pushed[where] + replay.worker[where] + replay.thrown[where]
        assert np.allclose(gradients, right, rtol=0, atol=1e-3), where
    for number, applied in replay.applied.items():
        mean = sum(replay.pushed[slot, number] for slot in range(3)) / 3
        assert np.allclose(mean, applied + replay.server[number] + replay.thrown[number], rtol=0, atol=1e-3), number
    skipped = {round_ for round_, (kind, _, _) in enumerate(results[0][1]) if kind == "SKIP"}
    assert skipped == set(BAD_ROUNDS)
    assert_losses_are_itemised(tmp_path, replay, rule, skipped)
    assert_the_run_says_so(tmp_path, replay)


BAD_ROUNDS = (7, 11, 30)


def sometimes_bad(rank, round_, tensor):
    """Return a gradient; worker 2's is infinite in two rounds."""
    vector = np.random.default_rng((rank, round_, tensor)).standard_normal(TABLE[tensor].elements).astype(np.float32)
    if rank == 2 and tensor == 0 and round_ in BAD_ROUNDS:
        vector[17] = np.inf
    return vector


def assert_the_run_says_so(directory, replay):
    """The ledger that the run makes of its own sums balances, in all that can be compared, and is that of the replay."""
    events = [json.loads(line) for line in (directory / "events-coordinator.jsonl").read_text().splitlines()]
    (ledger,) = [event for event in events if event["event"] == "ledger"]
    assert ledger["balanced"], ledger["text"]
    assert not ledger["open"]
    # Of each of two shards: 3 workers' gradients, its means, 3 workers' results, all pushes.
    assert ledger["compared"] == 2 * (3 + 1 + 3 + 1)
    assert ledger["difference"] < 1e-3
    thrown = any(norm > 0 for *_, norm in replay.losses)
    assert thrown == (ledger["workers"]["lost"] != 0 or ledger["servers"]["lost"] != 0)


def assert_losses_are_itemised(directory, replay, rule, skipped):
    """Every loss of the replay stands in an event log with its norm, and no other does.

    A server's loss in a skipped round is taken back with the round.
    """
    written = {}
    for file in directory.glob("events-*.jsonl"):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "loss":
                role = "server" if "server" in event["role"] else int(event["role"].rpartition("-")[2])
                if role != "server" or event["round"] not in skipped:
                    written[role, event["key"], event["round"]] = event["norm"]
    expected = {(role, key, round_): norm for role, key, round_, norm in replay.losses if norm > 0}
    assert (rule == "keep") == (not expected)
    assert written.keys() == expected.keys()
    assert all(written[where] == pytest.approx(norm, rel=1e-9) for where, norm in expected.items())
