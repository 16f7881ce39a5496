import numpy as np
import pytest
from test_ledger import coder, push

from ps_accordion.codecs import Push, fold, get, registry
from ps_accordion.errors import CodecError, PayloadError
from ps_accordion.regimes import Choice
from ps_accordion.worker.coder import coding_of

from .cases import Case, decode, encode, gaussian


def vote(vectors, level=1, weights=None, residual=None):
    """Return what a server sends for what these members push."""
    case, n = Case("signsgd", level), vectors[0].size
    made = [encode(case, v, None, seed=i) for i, v in enumerate(vectors)]
    weights = weights or [1.0] * len(vectors)
    pushes = [Push(weight, *each) for weight, each in zip(weights, made, strict=True)]
    out, new = np.empty(4096, np.uint8), np.full(n, np.nan, np.float32)
    done = fold(
        pushes, residual, new, elements=n, total_weight=sum(weights), seed_reply=99, scratch=np.empty(n, np.float32), out=out
    )
    assert not new.any()
    return decode(case, done.coding, out[: done.nbytes])


def test_a_server_sends_the_sign_that_most_members_sent():
    """However large the gradients of the minority are; a weight is as many members."""
    few, many = np.full(3000, 1e6, np.float32), np.full(3000, -1e-6, np.float32)
    assert set(vote([few, many, many]).tolist()) == {-1.0}
    assert set(vote([few, many, many], level=2.0**-10).tolist()) == {-(2.0**-10)}
    assert set(vote([few, many, many], weights=[3.0, 1.0, 1.0]).tolist()) == {1.0}


def test_a_tie_and_a_zero_are_coins_of_the_seed():
    """As many fall to either side, no two seeds alike, and the same every time."""
    zeros, ones = np.zeros(20_000, np.float32), np.ones(20_000, np.float32)
    of_zeros = [decode(Case("signsgd", 1), *encode(Case("signsgd", 1), zeros, None, seed)) for seed in (1, 1, 2)]
    of_ties = vote([ones, -ones])
    assert of_zeros[0].tobytes() == of_zeros[1].tobytes()
    for coins in (of_zeros[0], of_zeros[2], of_ties, of_zeros[0] * of_zeros[2], of_zeros[0] * of_ties):
        assert abs(coins.sum()) < 5 * 20_000**0.5


def test_a_residual_that_another_codec_left_votes_with_the_rest_and_is_gone():
    """Added to the mean, as every residual is."""
    ones = np.ones(100, np.float32)
    assert set(vote([ones, -ones], residual=-ones).tolist()) == {-1.0}


@pytest.mark.parametrize("level", [0.75, 3.0, 2.0**31, 2.0**-31, -1.0, float("nan")])
def test_a_level_is_a_power_of_two(level):
    """So that sums of votes are exact."""
    with pytest.raises(CodecError, match=r"a power of two from 2\^-30 to 2\^30"):
        get("signsgd").check_level(level)


def test_a_payload_is_refused_for_each_thing_that_can_be_wrong():
    """Length, count, level, and signs of elements that are not there."""
    coding, good = encode(Case("signsgd", 1), gaussian(100), None)
    codec = get("signsgd")
    codec.validate(good, coding)
    bad = good.copy()
    bad[-1] |= 0x80
    for match, payload, header in (
        ("no sign beyond element 100", bad, coding),
        ("100 entries in 16 bytes", good[:-1], coding),
        ("100 entries in 16 bytes", good, coding._replace(count=99)),
        ("expected a level", good, coding._replace(level=3.0)),
    ):
        with pytest.raises(PayloadError, match=match):
            codec.validate(payload, header)


def test_where_signs_mislead_feedback_finds_the_optimum_and_signs_alone_do_not():
    """Three losses, (x - 9)^2, x^2 and x^2: most signs point to 0, the optimum of their sum is 3.

    Votes go to 0 and stay there, however long it takes; signs with feedback end where dense training ends.
    """
    goals = [np.full(64, goal, np.float32) for goal in (9.0, 0.0, 0.0)]
    by_vote, x = np.full(64, 2.0, np.float32), np.full(64, 2.0, np.float32)
    residuals, of_server = [np.zeros(64, np.float32) for _ in goals], np.zeros(64, np.float32)
    case = Case("onebit", 64)
    for step in range(300):
        by_vote -= np.float32(0.02) * vote([by_vote - goal for goal in goals])
        pushes = [decode(case, *encode(case, x - goal, kept)) for goal, kept in zip(goals, residuals, strict=True)]
        mean = sum(pushes) / np.float32(len(goals))
        x -= np.float32(0.1 / (1 + step / 20)) * decode(case, *encode(case, mean, of_server))
    assert np.abs(by_vote).max() < 0.1
    assert np.abs(x - 3).max() < 0.1


def test_the_ledger_has_what_signs_do_not_carry_as_lost_and_misses_what_has_another_sign():
    """Lost by design, so the sums balance; one sign turned, in one round of twenty, is missing."""
    choice = Choice("signsgd", 2.0**-10)
    for turned in (False, True):
        of = coder()
        for round_ in range(20):
            message, payload = push(coder(), choice, round_)
            if turned and round_ == 7:
                payload = payload.copy()
                payload[5] ^= 1
            of.account.pushed(registry.get("signsgd"), payload, coding_of(message), gaussian(2048, round_))
        tally = of.account.closed(None)
        assert tally.lost != 0
        assert tally.spread == 0
        assert (abs(tally.difference) <= tally.slack) == (not turned)
