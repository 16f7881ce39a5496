"""Payloads that are read from the memory of their sender: the bits of the run whose payloads went through sockets, or no run."""

import json

import numpy as np
import pytest
from faults import faulty
from recorded import TABLE, assert_replay_agrees, assert_replicas_agree, run, train
from ring import Ring
from suites import usually

from ps_accordion.wire import lending

STATIC = {"regime.policy": "static", "timeouts.resend": 0.05, "timeouts.dead": 30}
LENT = {"dense32": True, "bf16": True, "dense16": False, "topk": False}


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    """Lend what is as small as the keys of a test."""
    monkeypatch.setattr(lending, "LEAST", 1024)


def lanes(directory):
    """Return what each worker has said of its links, in order."""
    files = sorted(directory.glob("events-worker-*.jsonl"))
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(event["push"], event["pull"], event["reason"]) for event in events if event["event"] == "lane"]


def moved(directory):
    """Return the bytes of all rounds and workers that were lent, and those that went through sockets."""
    files = directory.glob("metrics-worker-*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    lent = sum(line["lane_push_bytes"] + line["lane_pull_bytes"] for line in lines)
    return lent, sum(line["push_bytes"] + line["pull_bytes"] for line in lines) - lent


def of(directory, lane="auto", **more):
    """Return the settings of a run whose servers listen at sockets in files, which are removed when they end."""
    return {"servers.bind": f"ipc://{directory}/s{{number}}", "servers.lane": lane} | STATIC | more


@pytest.mark.parametrize("codec", usually(LENT, "dense32"))
def test_a_lane_changes_no_bit(tmp_path, codec):
    """Gradients, results and residuals are those of the run without one; what is compressed goes through sockets in both."""
    runs = {}
    for lane in ("auto", "off"):
        directory = tmp_path / lane
        runs[lane], settings = run(directory, 2, 2, codec, **of(tmp_path, lane))
        assert_replay_agrees(directory, settings, runs[lane][0][0])
    assert_replicas_agree([*runs["auto"], *runs["off"]])
    assert lanes(tmp_path / "auto") == [(True, True, "")] * 4
    assert lanes(tmp_path / "off") == []
    (lent, sent), (never, without) = moved(tmp_path / "auto"), moved(tmp_path / "off")
    assert never == 0
    if LENT[codec]:
        dense = 2 * 2 * 20 * sum(4 * tensor.elements for tensor in TABLE)
        assert sent < without / 3
        assert lent > dense / 4
    else:
        assert lent == 0


def test_lost_doubled_and_late_messages_change_no_bit(tmp_path):
    """Those of the agreement too; a message that comes when its payload has gone is as good as lost."""
    transport = faulty(5, {}, drop=0.1, double=0.15, reorder=0.15)
    results, settings = run(
        tmp_path, 2, 2, "dense32", lambda session: train(session, rounds=6), transport=transport, **of(tmp_path)
    )
    assert_replicas_agree(results)
    assert_replay_agrees(tmp_path, settings, results[0][0])
    assert moved(tmp_path)[0] > 0
    for file in tmp_path.glob("events-*.jsonl"):
        assert '"event": "garbage"' not in file.read_text()


def test_a_link_over_tcp_says_why_it_has_no_lane(tmp_path):
    """Once, in each worker's log."""
    Ring({"run.directory": str(tmp_path), "codec.name": "dense", "servers.count": 1}).run(train)
    assert lanes(tmp_path) == [(False, False, "its address is not ipc://")] * 2


def test_skipped_rounds_take_back_what_was_lent(tmp_path):
    """A gradient that is not finite: what others have lent returns to their residuals, from the same memory."""

    def poisoned(rank, round_, tensor):
        vector = np.random.default_rng((rank, round_, tensor)).standard_normal(TABLE[tensor].elements).astype(np.float32)
        if (rank, tensor) == (1, 0) and round_ in (0, 6, 7):
            vector[-1] = np.nan
        return vector

    results, settings = run(tmp_path, 2, 2, "dense32", lambda session: train(session, gradient=poisoned), **of(tmp_path))
    assert_replicas_agree(results)
    assert_replay_agrees(tmp_path, settings, results[0][0])
    assert [round_ for round_, (kind, *_) in enumerate(results[0][1]) if kind == "SKIP"] == [0, 6, 7]
    assert moved(tmp_path)[0] > 0
