"""What goes wrong on the way changes no bit: lost, doubled and reordered messages, and gradients that are not finite."""

import json

import numpy as np
import pytest
from faults import faulty
from recorded import CODECS, TABLE, assert_replay_agrees, assert_replicas_agree, gradient, run, train
from ring import Ring
from suites import usually

from ps_accordion.errors import RunAborted, TooManySkips

STATIC = {"regime.policy": "static", "timeouts.resend": 0.05, "timeouts.dead": 30}


@pytest.mark.parametrize("codec", usually(["dense32", "topk", "random_block"], "topk"))
def test_lost_doubled_and_reordered_messages_change_no_bit(tmp_path, codec):
    """20 % lost, 10 % doubled, 15 % held back behind later ones, everywhere: the bits of the clean run."""
    clean, _ = run(tmp_path / "clean", 2, 2, codec, **STATIC)
    faults = {}
    transport = faulty(3, faults, drop=0.2, double=0.1, reorder=0.15)
    rough, settings = run(tmp_path / "rough", 2, 2, codec, transport=transport, **STATIC)
    assert_replicas_agree([*clean, *rough])
    assert_replay_agrees(tmp_path / "rough", settings, rough[0][0])
    for name, counted in faults.items():
        assert counted.counts["dropped"] > 0, (name, counted.counts)
    assert sum(counted.counts["reordered"] + counted.counts["doubled"] for counted in faults.values()) > 50


BAD_ROUNDS = (0, 6, 7, 13)


def poisoned(rank, round_, tensor):
    """Put one NaN, or an infinity, into the last tensor of one worker in some rounds."""
    vector = gradient(rank, round_, tensor)
    if round_ in BAD_ROUNDS and rank == 1 and TABLE[tensor].name == "first.weight":
        vector[-1] = np.nan if round_ != 7 else np.inf
    return vector


def poisoned_late(session):
    """Hand over the poisoned tensor last, when the other keys of the round have been pushed and answered."""
    decisions, applied = [], []
    tracked = session.open_layout(TABLE, decided=decisions.append)
    for round_ in range(20):
        vectors = [poisoned(session.rank, round_, tensor) for tensor in range(len(TABLE))]
        for tensor in (1, 2, 3, 4):
            tracked.add(tensor, vectors[tensor])
        # The other tensors make whole keys; wait until their results are here before the late one goes.
        session.client.wait(lambda: len(tracked.exchange.rounds._decoded) >= 1, "an early key", 20)
        tracked.add(0, vectors[0])
        tracked.wait()
        applied.append((decisions[-1].kind, decisions[-1].used if decisions[-1].kind == "DATA" else (), vectors))
    return tracked.exchange.layout, [
        (kind, used, vectors if kind == "DATA" else [np.zeros(1)]) for kind, used, vectors in applied
    ]


@pytest.mark.parametrize("codec", usually(CODECS, "dense32", "topk", "random_block"))
def test_a_nan_in_a_late_key_undoes_the_round_everywhere(tmp_path, codec):
    """Shards that had finished their key of the round go back too; replicas and residuals are those of the replay."""
    results, settings = run(tmp_path, 3, 2, codec, work=poisoned_late)
    assert_replicas_agree(results)
    kinds = [kind for kind, _, _ in results[0][1]]
    assert [round_ for round_, kind in enumerate(kinds) if kind == "SKIP"] == list(BAD_ROUNDS)
    assert_replay_agrees(tmp_path, settings, results[0][0])
    skips = [json.loads(line) for line in (tmp_path / "events-worker-2.jsonl").read_text().splitlines()]
    assert [event["round"] for event in skips if event["event"] == "skip"] == list(BAD_ROUNDS)


def test_the_run_stops_after_too_many_skips_in_a_row():
    """Every worker says so, and names the setting."""

    def always_bad(session):
        tracked = session.open_layout(TABLE[:1])
        for round_ in range(20):
            vector = gradient(session.rank, round_, 0)
            vector[0] = np.nan
            tracked.add(0, vector)
            tracked.wait()

    ring = Ring({"skip.limit": 4, "workers.count": 2, "servers.count": 1})
    with pytest.raises((TooManySkips, RunAborted)):
        ring.run(always_bad)
    named = [error for error in ring.errors if isinstance(error, TooManySkips)]
    assert named
    assert "rounds 0 to 3" in str(named[0])
    assert "skip.limit = 4" in str(named[0])


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(tmp_path):
    """The counter starts again with every round that is applied."""
    results, _ = run(tmp_path, 2, 1, "topk", work=lambda session: train(session, gradient=poisoned), **{"skip.limit": 3})
    assert sum(kind == "SKIP" for kind, _, _ in results[0][1]) == 4
