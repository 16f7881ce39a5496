"""The product's first promise: every replica holds the same bits, and they are the bits that a replay in numpy gives."""

import pytest
from recorded import CODECS, ROUNDS, assert_replay_agrees, assert_replicas_agree, run
from replay import plan_log


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_replicas_results_and_residuals_have_the_bits_of_a_replay(tmp_path, workers, servers, codec):
    """Whatever the arrival order: replicas agree, and so does an independent replay from gradients and plan log."""
    results, settings = run(tmp_path, workers, servers, codec)
    assert_replicas_agree(results)
    assert_replay_agrees(tmp_path, settings, results[0][0])


def test_the_exactness_runs_do_change_levels(tmp_path):
    """The runs above prove something about switches only if plans do switch levels in them."""
    run(tmp_path, 2, 1, "topk")
    plans, carried = plan_log(tmp_path)
    in_force = {version for round_, version in carried.items() if round_ < ROUNDS - 1}
    levels = [level for version in in_force for _, level in plans[version].values()]
    assert {0.1, 0.01} <= set(levels)
