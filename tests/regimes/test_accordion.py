"""Accordion's decisions, against a table worked out by hand and against the released code's rule written down again."""

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.regimes import Choice, Decision, Window
from ps_accordion.regimes.accordion import Accordion

LIGHT, HEAVY = Choice("topk", 0.04), Choice("topk", 0.005)
ROUNDS = 10
"""Rounds a window in these tests: window w is rounds 10 w to 10 w + 9."""
NAN = math.nan


def accordion(tensors, **options):
    """Return the policy between the two levels of these tests."""
    return Accordion(light=[LIGHT] * tensors, heavy=[HEAVY] * tensors, **options)


def window(index, *members):
    """Return window `index`, with one row of norms a member."""
    unknown = np.full(len(members), NAN)
    norms = np.array(members, dtype=np.float64)
    return Window(index, index * ROUNDS + ROUNDS - 1, norms, unknown, unknown, tuple(range(len(members))))


def run(policy, rates, members):
    """Return the levels in force after each window, as strings of L and H; rates[w] is what window w trains with.

    Args:
        policy: Who decides.
        rates: One learning rate a window.
        members: For each window, the rows of norms.
    """
    levels = "L" * policy.tensors
    history = []
    for index, (rate, rows) in enumerate(zip(rates, members, strict=True)):
        if decision := policy.rate(rate, index * ROUNDS):
            levels = letters(decision)
        if decision := policy.window(window(index, *rows)):
            levels = letters(decision)
        history.append(levels)
    return history


def letters(decision: Decision) -> str:
    """Return a decision as L for light and H for heavy, a letter a tensor."""
    assert tuple(LIGHT if flag else HEAVY for flag in decision.critical) == decision.choices
    return "".join("L" if choice == LIGHT else "H" for choice in decision.choices)


# A recorded trace and its decisions, worked out by hand: five tensors, a check every second window (0, 2, 4, ...), eta = 0.5.
# "Levels" are those in force after the window. r is the ratio |old - now| / old of a check against the one two windows before.
#
#  w  rate    a     b     c     d     e   levels  why
TRACE = (
    (0, 0.10, 10.0, 10.0, 0.0, 4.0, 2.0, "LLLLL"),  # first window: light everywhere
    (1, 0.10, 99.0, 0.01, 9.0, 0.0, NAN, "LLLLL"),  # not a check: not looked at, whatever it holds
    (2, 0.10, 5.00, 5.01, 3.0, 6.0, 2.0, "LHLLH"),  # a: r = 0.5, critical; b: 0.499; c: old is 0; d: rises by 0.5; e: 0
    (3, 0.10, 0.00, 0.00, 0.0, 0.0, 0.0, "LHLLH"),  # not a check
    (4, 0.10, 5.00, 2.00, 3.0, 7.0, NAN, "HLHHL"),  # b: r = 0.60; d: 0.17; e: not a number now
    (5, 0.01, 5.00, 2.00, 3.0, 7.0, 2.0, "LLLLL"),  # the rate fell to a tenth before window 5
    (6, 0.01, 1.00, 2.00, 3.0, 7.0, 2.0, "LHHHL"),  # the next check decides again; a: 0.8; e: not a number two windows ago
    (7, 0.01, 1.00, 2.00, 3.0, 7.0, 2.0, "LHHHL"),  # not a check
    (8, 0.01, 1.49, 2.00, 0.0, 7.0, 2.0, "HHLHH"),  # a: rises by 0.49; c: falls to 0, r = 1
    (9, 0.01, 1.49, 2.00, 0.0, 7.0, 2.0, "HHLHH"),  # not a check
    (10, 0.001, 1.5, 2.00, 0.0, 7.0, 2.0, "HHLHH"),  # dropped before window 10, whose own check then decides; c: old is 0
)


def test_decisions_follow_the_published_rule_on_a_recorded_trace():
    """Every entry of the hand-made table is what the policy decides."""
    rates = [row[1] for row in TRACE]
    # Two members whose mean is the table's norm.
    members = [(np.array(row[2:7]) * 0.5, np.array(row[2:7]) * 1.5) for row in TRACE]
    assert [row[7] for row in TRACE] == run(accordion(5, interval=2), rates, members)


def released(norms, rates, interval):
    """Return the levels after each epoch by the rule of the released code of the paper, from worker 0's norms.

    At the end of an epoch: if it is a multiple of the interval, compare its norms with those `interval` epochs earlier
    (low compression for all at epoch 0; an earlier norm of 0 counts as critical); then, if the next rate is lower than this
    one, low compression for all.
    """
    history = []
    levels = ["L"] * len(norms[0])
    for epoch, now in enumerate(norms):
        if epoch % interval == 0:
            if epoch == 0:
                levels = ["L"] * len(now)
            else:
                old = norms[epoch - interval]
                ratios = [abs(o - n) / o if o else 9.0 for o, n in zip(old, now, strict=True)]
                levels = ["H" if ratio < 0.5 else "L" for ratio in ratios]
        if epoch + 1 < len(rates) and rates[epoch + 1] < rates[epoch]:
            levels = ["L"] * len(now)
        history.append("".join(levels))
    return history


@st.composite
def traces(draw):
    """Draw norms of three tensors over some epochs and a step schedule with warm-up that never falls by less than half."""
    epochs = draw(st.integers(1, 40))
    norm = st.one_of(st.just(0.0), st.floats(0.0, 100.0, width=16))
    norms = draw(st.lists(st.tuples(norm, norm, norm), min_size=epochs, max_size=epochs))
    rate, rates = 0.1, []
    for step in draw(st.lists(st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.1, 1.5]), min_size=epochs, max_size=epochs)):
        rate *= step
        rates.append(rate)
    return norms, rates, draw(st.integers(1, 10))


@given(traces())
def test_agrees_with_the_released_code_under_step_schedules(trace):
    """With signal "released", every decision is that of the released code, wherever a drop is to half or less."""
    norms, rates, interval = trace
    policy = accordion(3, interval=interval, signal="released")
    levels = "LLL"
    history = []
    for index, row in enumerate(norms):
        if index == 0:
            assert policy.rate(rates[0], 0) is None
        if decision := policy.window(window(index, row, (NAN, 7.0, 0.0))):
            levels = letters(decision)
        if index + 1 < len(rates) and (decision := policy.rate(rates[index + 1], (index + 1) * ROUNDS)):
            levels = letters(decision)
        history.append(levels)
    assert released(norms, rates, interval) == history


@given(traces())
def test_the_same_reports_give_the_same_decisions(trace):
    """The policy is a function of what it was told."""
    norms, rates, interval = trace
    members = [(row, row[::-1]) for row in norms]
    assert run(accordion(3, interval=interval), rates, members) == run(accordion(3, interval=interval), rates, members)


@given(traces())
def test_all_is_light_from_a_drop_until_the_next_check(trace):
    """After a drop of the rate no tensor is heavy before the next scheduled check has been made."""
    norms, rates, interval = trace
    policy = accordion(3, interval=interval)
    levels, reset, held = "LLL", rates[0], False
    for index, (rate, row) in enumerate(zip(rates, norms, strict=True)):
        if decision := policy.rate(rate, index * ROUNDS):
            levels = letters(decision)
        if rate <= 0.5 * reset:
            held = True
        reset = rate if rate > reset or rate <= 0.5 * reset else reset
        assert levels == "LLL" or not held
        if decision := policy.window(window(index, row)):
            levels = letters(decision)
        held = held and index % interval != 0
        assert index > 0 or levels == "LLL"


def test_a_check_from_before_the_drop_does_not_take_light_back():
    """A drop is known before the window ahead of it is complete, because members report at different times."""
    policy = accordion(1, interval=1)
    policy.rate(0.1, 0)
    policy.window(window(0, [1.0]))
    assert letters(policy.window(window(1, [1.0]))) == "H"
    assert letters(policy.rate(0.01, 30)) == "L"
    assert letters(policy.window(window(2, [1.0]))) == "L", "window 2 is rounds 20 to 29, all before the drop"
    assert letters(policy.window(window(3, [1.0]))) == "H"


def test_cosine_decay_drops_only_when_the_rate_has_halved():
    """A cosine schedule over 100 epochs makes few resets, not one an epoch, and none in its first half."""
    policy = accordion(1)
    rates = [0.05 * (1 + math.cos(math.pi * epoch / 100)) for epoch in range(101)]
    resets = [epoch for epoch, rate in enumerate(rates) if policy.rate(rate, epoch)]
    # By hand: cos(pi x) = 0 at x = 1/2, and cos(pi x) = -1/2 at x = 2/3; the last one is the rate of 0.
    assert resets[:2] == [50, 67]
    assert resets[-1] == 100
    references = [rates[0], *(rates[epoch] for epoch in resets)]
    assert all(now <= before / 2 for before, now in itertools.pairwise(references))
    assert len(resets) == 10


def test_warm_up_raises_the_reference_and_resets_nothing():
    """A drop is measured from the highest rate since the last reset."""
    policy = accordion(1)
    assert [policy.rate(rate, 0) for rate in (0.02, 0.06, 0.1, 0.051)] == [None] * 4
    assert policy.rate(0.05, 0) is not None
    assert policy.rate(0.03, 0) is None
    assert policy.rate(0.0, 0) is not None
    assert policy.rate(0.0, 0) is None, "a rate that stays at 0 has not dropped again"


def test_a_check_without_its_counterpart_is_light():
    """When the window to compare with never came, statistics are missing, and all is light until the next check."""
    policy = accordion(2, interval=2)
    for index, expected in ((0, "LL"), (2, "HH"), (6, "LL"), (8, "HH")):
        assert letters(policy.window(window(index, [1.0, 1.0]))) == expected


def test_a_missing_member_makes_the_mean_missing_but_not_the_released_signal():
    """One NaN in a column is enough under "mean"; under "released" only the lowest member's row counts."""
    for signal, expected in (("mean", "LH"), ("released", "HH")):
        policy = accordion(2, interval=1, signal=signal)
        policy.window(window(0, [1.0, 1.0], [1.0, 1.0]))
        assert letters(policy.window(window(1, [1.0, 1.0], [NAN, 1.0]))) == expected
    policy = accordion(2, interval=1, signal="released")
    policy.window(window(0, [1.0, 1.0], [1.0, 1.0]))
    assert letters(policy.window(window(1, [NAN, 1.0], [1.0, 1.0]))) == "LH"


def test_infinite_norms_are_light():
    """A norm that overflowed is as good as missing."""
    policy = accordion(3, interval=1)
    policy.window(window(0, [1.0, math.inf, 5e-324]))
    assert letters(policy.window(window(1, [math.inf, 1.0, 1e308]))) == "LLL"


def test_a_decision_carries_the_numbers_it_was_made_from():
    """The event log can show old norm, new norm and ratio of every tensor."""
    policy = accordion(2, interval=1)
    policy.window(window(0, [4.0, 0.0]))
    decision = policy.window(window(1, [3.0, 1.0]))
    assert decision.statistics == {"norm_old": (4.0, 0.0), "norm_now": (3.0, 1.0), "ratio": (0.25, math.inf)}
    assert decision.reason == "check at window 1: 1 of 2 tensors critical"


def test_the_threshold_is_what_was_asked_for():
    """A relative change of exactly the threshold is critical."""
    policy = accordion(2, interval=1, threshold=0.25)
    policy.window(window(0, [4.0, 4.0]))
    assert letters(policy.window(window(1, [3.0, 3.1]))) == "LH"


# ---------------------------------------------------------------- batches


def batches(policy, *steps):
    """Return the batch multiplier after each step: a learning rate, or norms of the next window and perhaps how long it is."""
    told, index, round_, now = [], 0, -1, 1
    for step in steps:
        if isinstance(step, float):
            decision = policy.rate(step, round_ + 1)
        else:
            norms, length = step if isinstance(step, tuple) else (step, ROUNDS)
            round_ += length
            unknown = np.full(1, NAN)
            decision = policy.window(Window(index, round_, np.array([norms], np.float64), unknown, unknown, (0,)))
            index += 1
        now = decision.batch_multiplier if decision is not None else now
        told.append(now)
    return told


def test_the_batch_grows_once_the_whole_model_is_not_critical():
    """One tensor that changes much does not hold it back where it is a small part of the whole, whatever its own level."""
    policy = accordion(2, interval=1, batch_multiplier=8)
    assert batches(policy, [100.0, 1.0], [40.0, 1.0], [30.0, 9.0], [30.0, 90.0]) == [1, 1, 8, 8]
    assert batches(accordion(2, interval=1), [100.0, 1.0], [99.0, 1.0]) == [1, 1]  # unless the user says so, it never does


def test_the_norm_of_the_whole_is_that_of_all_tensors_together():
    """3 and 4 make 5: a change by half of that is critical, and one a little smaller is not."""
    for second, expected in (([1.5, 2.0], 1), ([1.6, 2.1], 8), ([4.5, 6.0], 1), ([4.4, 6.0], 8)):
        policy = accordion(2, interval=1, batch_multiplier=8)
        assert batches(policy, [3.0, 4.0], second) == [1, expected]


def test_a_large_batch_stays_large():
    """As published: it only grows. Levels go on changing."""
    policy = accordion(1, interval=1, batch_multiplier=4)
    assert batches(policy, [8.0], [8.0], [80.0], [2.0], [2.0]) == [1, 4, 4, 4, 4]
    assert letters(policy.window(window(5, [99.0]))) == "L"


def test_in_doubt_the_batch_is_small_again():
    """A drop of the rate, a member that joins, a norm that is missing; afterwards it has to be seen to grow again."""
    grown = ([8.0], [8.0])
    policy = accordion(1, interval=1, batch_multiplier=4)
    assert batches(policy, 0.1, *grown, 0.01, [80.0], [80.0]) == [1, 1, 4, 1, 1, 4]
    assert batches(accordion(1, interval=1, batch_multiplier=4), *grown, [NAN], [8.0], [8.0]) == [1, 4, 1, 1, 4]
    policy = accordion(1, interval=1, batch_multiplier=4)
    batches(policy, *grown)
    assert policy.all_light("a member joined").batch_multiplier == 1
    assert policy.window(window(2, [80.0])).batch_multiplier == 1


def test_windows_of_fewer_rounds_are_compared_by_the_round():
    """An epoch of eightfold batches has an eighth of the rounds, and a sum an eighth as long: nothing has changed."""
    steady = [([80.0, 8.0], 80), ([80.0, 8.0], 80), ([10.0, 1.0], 10), ([10.0, 1.0], 10)]
    policy = accordion(2, interval=1, batch_multiplier=8)
    assert batches(policy, *steady) == [1, 8, 8, 8]
    policy = accordion(2, interval=1, batch_multiplier=8)
    round_, levels = -1, []
    for index, (norms, length) in enumerate(steady):
        round_ += length
        one = np.full(1, NAN)
        levels.append(letters(policy.window(Window(index, round_, np.array([norms]), one, one, (0,)))))
    assert levels == ["LL", "HH", "HH", "HH"]


def test_the_mean_over_members_decides_about_the_batch_too():
    """Of the members' norms of the whole, not of the tensors' means; "released" looks at the lowest member alone."""
    for signal, expected in (("mean", 1), ("released", 8)):
        policy = accordion(1, interval=1, batch_multiplier=8, signal=signal)
        policy.window(window(0, [1.0], [99.0]))
        assert policy.window(window(1, [1.0], [1.0])).batch_multiplier == expected


def test_the_log_says_why_the_batch_is_what_it_is():
    """With the norms that were compared; tensors are counted without the whole."""
    policy = accordion(2, interval=1, batch_multiplier=8)
    policy.window(window(0, [30.0, 40.0]))
    decision = policy.window(window(1, [30.0, 4.0]))
    assert decision.reason == (
        "check at window 1: 1 of 2 tensors critical; batch x 8, the whole model's norm went from 5 to 3.03 a round"
    )
    assert {name: len(values) for name, values in decision.statistics.items()} == {"norm_old": 2, "norm_now": 2, "ratio": 2}
