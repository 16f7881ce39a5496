"""The product's first promise: every replica holds the same bits, and they are the bits that a replay in numpy gives."""

import itertools
import json

import numpy as np
import pytest
from recorded import ROUNDS, TABLE, assert_replay_agrees, assert_replicas_agree, gradient, run, train, used
from replay import plan_log
from suites import usually

from ps_accordion.layout import Tensor

THROUGH_AND_THROUGH = ("dense32", "dense16", "topk", "topk32", "random_block")
"""Codecs that run with every number of workers and servers; of the others, that is as good as all of them."""
NUMBERS = [*itertools.product([1, 2, 3], [1, 2, 3], THROUGH_AND_THROUGH), (3, 2, "onebit")]
USUAL = [case for case in NUMBERS if case[2] not in ("dense16", "topk32") or case[:2] in ((2, 3), (3, 2))]
"""Another number format adds up the same way, whatever the numbers."""
NOISY = ("natural", "qsgd", "quic_fl", "terngrad")
SPARSE = ("random_k, cyclic", "blocks, cyclic", "threshold, packed", "topk, int8")
WHOLE = ("powersgd", "powersgd, topk")
"""Tensors that are keys as a whole; in the second one of them, beside another in partitions."""
USUALLY = ("dgc", "eden", "int", "signsgd", *NOISY, "random_k, cyclic", "powersgd, topk")
ONCE = usually(("bf16", "dgc", "eden", "int", "signsgd", *NOISY, *SPARSE, *WHOLE), *USUALLY)
"""Codecs that share their rounds with others: one number of workers and servers is enough."""


@pytest.mark.parametrize(("workers", "servers", "codec"), usually(NUMBERS, *USUAL))
def test_replicas_results_and_residuals_have_the_bits_of_a_replay(tmp_path, workers, servers, codec):
    """Whatever the arrival order: replicas agree, and so does an independent replay from gradients and plan log."""
    results, settings = run(tmp_path, workers, servers, codec)
    assert_replicas_agree(results)
    assert_replay_agrees(tmp_path, settings, results[0][0])


@pytest.mark.parametrize("codec", ONCE)
def test_runs_of_other_codecs_have_the_bits_of_a_replay(tmp_path, codec):
    """Two ways, with residuals at both ends or with noise at both, which the ledger then has as an item."""
    results, settings = run(tmp_path, 2, 2, codec)
    assert_replicas_agree(results)
    assert_replay_agrees(tmp_path, settings, results[0][0])
    events = [json.loads(line) for line in (tmp_path / "events-coordinator.jsonl").read_text().splitlines()]
    (ledger,) = [event for event in events if event["event"] == "ledger"]
    assert ledger["balanced"], ledger["text"]
    assert all((ledger[side]["spread"] > 0) == (codec in NOISY) for side in ("workers", "servers"))


def test_the_exactness_runs_do_change_levels(tmp_path):
    """The runs above prove something about switches only if plans do switch levels in them."""
    run(tmp_path, 2, 1, "topk")
    plans, carried = plan_log(tmp_path)
    in_force = {version for round_, version in carried.items() if round_ < ROUNDS - 1}
    levels = [level for version in in_force for _, level in plans[version].values()]
    assert {0.1, 0.01} <= set(levels)


BUFFERED = [*TABLE, Tensor("*buffers*", (5000,), "float32", buffer=True)]
BUFFERS = len(TABLE)


def values_of(rank, round_, tensor):
    """Return a gradient as ever, and buffers that differ between workers; one gradient is not finite."""
    if tensor == BUFFERS:
        return np.random.default_rng((rank, round_, 9)).standard_normal(5000).astype(np.float32)
    vector = gradient(rank, round_, tensor)
    if (rank, round_, tensor) == (1, 6, 0):
        vector[17] = np.nan
    return vector


def has(rank, round_, tensor):
    return round_ % 3 != 2 if tensor == BUFFERS else used(rank, round_, tensor)


def weight_of(rank, round_):
    return (0.3, 32.0, 5.0)[(rank + round_) % 3]


@pytest.mark.parametrize("codec", ["mixed", "random_block"])
def test_weights_and_buffers_have_the_bits_of_a_replay_too(tmp_path, codec):
    """Weights that change from round to round, buffers of the lead in all workers, and a skipped round in between.

    With one codec, or with topk for one tensor, int for the other, and small ones of which one is exact and one has momentum.
    """

    def work(session):
        return train(session, BUFFERED, gradient=values_of, used=has, weight=weight_of)

    results, settings = run(tmp_path, 3, 2, codec, work)
    assert_replicas_agree(results)
    assert_replay_agrees(tmp_path, settings, results[0][0], weight=weight_of)
    for round_, (kind, _, means) in enumerate(results[2][1]):
        if kind == "SKIP" or not has(0, round_, BUFFERS):
            assert np.isnan(means[BUFFERS]).all()
        else:
            assert means[BUFFERS].tobytes() == values_of(0, round_, BUFFERS).tobytes()
    assert [round_ for round_, (kind, *_) in enumerate(results[0][1]) if kind == "SKIP"] == [6]
