"""The planner: reports in, numbered plans out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.compression import CodecSettings
from ps_accordion.config import RegimeSettings, Settings, load
from ps_accordion.coordinator.planning import LIFE_INTERVALS, MIN_LIFE_ROUNDS, Planner
from ps_accordion.errors import ConfigError, WireError
from ps_accordion.layout import Layout, Tensor
from ps_accordion.regimes import Choice, decode_plan
from ps_accordion.regimes.base import Decision, Policy

NAN = math.nan
LAYOUT = Layout(
    [Tensor("a.weight", (64, 64), "float32"), Tensor("a.bias", (64,), "float32"), Tensor("b.weight", (32, 64), "float32")],
    num_shards=2,
    partition_elements=1024,
)
LIGHT, HEAVY = Choice("topk", 0.04), Choice("topk", 0.005)
SETTINGS = Settings(regime=RegimeSettings(interval=1, window="10 steps"), codec=CodecSettings(light=0.04, heavy=0.005))


class Recorder(Policy):
    """Keeps what it is shown; answers from two lists, or with None."""

    def __init__(self, windows=(), rates=()):
        super().__init__(light=[LIGHT] * 3, heavy=[HEAVY] * 3)
        self.answers = {"window": list(windows), "rate": list(rates)}
        self.windows, self.rates = [], []

    def window(self, window):
        self.windows.append(window)
        return self.answers["window"].pop(0) if self.answers["window"] else None

    def rate(self, rate, round_):
        self.rates.append((rate, round_))
        return self.answers["rate"].pop(0) if self.answers["rate"] else None


def report(planner, slot, window, norms=(1.0, 1.0, 1.0), *, rate=0.1, loss=1.0, members=(0, 1), length=10):
    """Report one window of `length` rounds for one slot."""
    values = np.array(norms, dtype=np.float32)
    round_ = window * length + length - 1
    planner.report(slot, window=window, round_=round_, norms=values, rate=rate, loss=loss, members=members)


def test_a_window_is_judged_when_every_member_has_reported_it():
    """Nothing happens before the last report; then the policy sees one row a member, in slot order."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    report(planner, 1, 0, (4.0, 5.0, 6.0), rate=0.2, loss=3.0)
    assert policy.windows == []
    report(planner, 0, 0, (1.0, 2.0, 3.0))
    (window,) = policy.windows
    assert (window.index, window.round, window.slots) == (0, 9, (0, 1))
    np.testing.assert_array_equal([[1, 2, 3], [4, 5, 6]], window.norms)
    assert (window.rates.tolist(), window.losses.tolist()) == ([0.1, 0.2], [1.0, 3.0])


def test_a_report_of_the_next_window_closes_the_one_before():
    """Who did not report is a row of NaN; its report is ignored when it comes after all."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    report(planner, 0, 0)
    report(planner, 0, 1)
    (window,) = policy.windows
    np.testing.assert_array_equal([[1, 1, 1], [NAN, NAN, NAN]], window.norms)
    assert math.isnan(window.rates[1])
    report(planner, 1, 0)
    assert len(policy.windows) == 1
    report(planner, 1, 1)
    assert [seen.index for seen in policy.windows] == [0, 1]


def test_repeated_late_and_foreign_reports_change_nothing():
    """Reports are sent until they are acknowledged, so the first of each counts."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    report(planner, 0, 3, (1.0, 1.0, 1.0))
    report(planner, 0, 3, (9.0, 9.0, 9.0))
    report(planner, 7, 3)
    report(planner, 0, 2)
    report(planner, 1, 3)
    for slot in (0, 1):
        report(planner, slot, 3, (9.0, 9.0, 9.0))
    assert [window.norms.tolist() for window in policy.windows] == [[[1, 1, 1], [1, 1, 1]]]


def test_a_member_that_leaves_completes_the_window():
    """The others do not wait for a slot that is no member any more."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    report(planner, 0, 0)
    planner.rate(0, 0.1, 10, members=(0,))
    assert [window.slots for window in policy.windows] == [(0,)]


def test_a_member_that_joins_makes_all_light():
    """Safe levels hold from a join until the policy decides again."""
    planner = Planner.for_layout(0, LAYOUT, SETTINGS)
    for window in range(2):
        for slot in (0, 1):
            report(planner, slot, window)
    assert planner.plan.choices == (HEAVY,) * 3
    planner.rate(0, 0.1, 20, members=(0, 1, 2))
    assert (planner.plan.choices, planner.plan.reason) == ((LIGHT,) * 3, "a member joined")


def test_norms_that_are_negative_count_as_missing():
    """A norm is not negative; what says so is not used."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    report(planner, 0, 0, (-1.0, 1.0, math.inf), members=(0,))
    np.testing.assert_array_equal([[NAN, 1.0, math.inf]], policy.windows[0].norms)


def test_reports_that_do_not_fit_are_refused_with_their_sender():
    """The wrong number of norms and negative counts are errors of that worker."""
    planner = Planner(0, LAYOUT, Recorder())
    with pytest.raises(WireError, match="3 norms, worker 1 sent 2"):
        report(planner, 1, 0, (1.0, 1.0))
    with pytest.raises(WireError, match="worker 1 sent -1 and -1"):
        report(planner, 1, -1)


def test_only_the_lowest_members_changes_of_rate_count():
    """The policy hears of each change once, from one worker, and never of what is no rate."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    calls = [(0, 0.1, 0), (1, 0.01, 1), (0, 0.1, 2), (0, NAN, 3), (0, -1.0, 3), (0, math.inf, 3), (0, 0.2, 4), (5, 0.3, 5)]
    for slot, rate, round_ in calls:
        planner.rate(slot, rate, round_, members=(0, 1))
    assert policy.rates == [(0.1, 0), (0.2, 4)]


def test_an_older_rate_does_not_follow_a_newer_one():
    """A window report that arrives after the drop carries the rate from before it; that is no rise."""
    policy = Recorder()
    planner = Planner(0, LAYOUT, policy)
    report(planner, 0, 0, rate=0.1)
    planner.rate(0, 0.01, 10, members=(0, 1))
    report(planner, 1, 0, rate=0.1)
    assert policy.rates == [(0.01, 10)]
    report(planner, 0, 1, rate=0.001)
    report(planner, 1, 1)
    assert policy.rates == [(0.01, 10), (0.001, 19)], "a drop that only the report shows is seen, late"


def test_a_late_report_does_not_undo_the_light_levels_of_a_drop():
    """Drop reported first, then the rest of the window before it: light stays until the next check."""
    planner = Planner.for_layout(0, LAYOUT, SETTINGS)
    for slot in (0, 1):
        report(planner, slot, 0)
    report(planner, 0, 1)
    planner.rate(0, 0.01, 20, members=(0, 1))
    report(planner, 1, 1)
    assert planner.plan.choices == (LIGHT,) * 3
    for slot in (0, 1):
        report(planner, slot, 2, rate=0.01)
    assert planner.plan.choices == (HEAVY,) * 3


def test_a_plan_is_pending_until_every_member_has_it():
    """No plan, nothing to send; a member that lags keeps it pending; and what is sent is that plan."""
    planner = Planner.for_layout(0, LAYOUT, SETTINGS, last_version=41)
    assert planner.pending([0, 0]) is None
    for slot in (0, 1):
        report(planner, slot, 0)
    version, encoded = planner.pending([42, 41])
    assert (42, planner.plan) == (version, decode_plan(encoded, 3))
    assert planner.pending([42, 42]) is None
    assert planner.pending([0, 42]) == (version, encoded)


def test_plans_are_renewed_before_they_expire_and_not_at_every_window():
    """Over 3,000 windows of 10 rounds without a decision, a plan always holds, and under 40 versions are used."""
    policy = Recorder(windows=[Recorder().start()])
    planner = Planner(0, LAYOUT, policy)
    for window in range(3000):
        report(planner, 0, window, members=(0,))
        assert planner.plan.expires_round > window * 10 + 10 + MIN_LIFE_ROUNDS // 4
    assert planner.plan.version < 40
    assert planner.plan.choices == (LIGHT,) * 3
    renewal = planner.events()[1]
    assert (renewal["renewal"], renewal["reason"], renewal["names"], renewal["critical"]) == (True, "renewed", [], [])


def test_a_plan_outlives_several_intervals_of_long_windows():
    """The life of a plan follows the window length that was observed."""
    policy = Recorder(windows=[Recorder().start()])
    planner = Planner(0, LAYOUT, policy, interval=5)
    report(planner, 0, 0, members=(0,), length=700)
    assert planner.plan.expires_round == 699 + LIFE_INTERVALS * 5 * 700


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8), st.sampled_from([0.1, 0.2, 0.01, NAN])), max_size=40))
def test_versions_count_up_whatever_the_order_of_reports(calls):
    """Every event has a version one above the last, the last is the plan's, and only the newest window is kept."""
    planner = Planner.for_layout(0, LAYOUT, SETTINGS, last_version=5)
    for slot, window, rate in calls:
        report(planner, slot, window, rate=rate, members=(0, 1, 2))
        planner.rate(slot, rate, window * 10, members=(0, 1, 2))
    versions = [event["version"] for event in planner.events()]
    assert list(range(6, 6 + len(versions))) == versions
    assert planner.plan is None or planner.plan.version == versions[-1]


def test_an_event_shows_why_a_plan_is_as_it_is():
    """Names, levels, regimes and the statistics of every compressible tensor; small tensors are not shown."""
    planner = Planner.for_layout(4, LAYOUT, SETTINGS)
    for window, norms in enumerate([(4.0, 4.0, 4.0), (3.0, 9.0, 8.0)]):
        for slot in (0, 1):
            report(planner, slot, window, norms, loss=0.25 if slot else NAN)
    first, second = planner.events()
    assert (first["reason"], first["critical_share"]) == ("first window", 1.0)
    expected = {
        "layout": 4,
        "version": 2,
        "reason": "check at window 1: 2 of 3 tensors critical",
        "round": 19,
        "expires_round": 19 + MIN_LIFE_ROUNDS,
        "window": 1,
        "rate": 0.1,
        "loss": 0.25,
        "critical_share": 0.5,
        "batch_multiplier": 1,
        "renewal": False,
        "names": ["a.weight", "b.weight"],
        "codecs": ["topk", "topk"],
        "levels": [0.005, 0.04],
        "critical": [False, True],
        "norm_old": [4.0, 4.0],
        "norm_now": [3.0, 8.0],
        "ratio": [0.25, 1.0],
    }
    assert expected == second
    assert planner.critical_share == 0.5
    assert planner.events() == []


def test_each_tensor_turns_between_its_own_two_levels():
    """Codecs by name: what a row of the table says of a tensor is what its plan says, light and heavy."""
    text = '{"b.*" = {codec = "int", light = 8, heavy = 2}, "*.bias" = "onebit"}'
    settings = load(environment={}, overrides={"regime.interval": 1, "codec.tensors": text})
    planner = Planner.for_layout(0, LAYOUT, settings)
    for window, norms in enumerate([(4.0, 4.0, 4.0), (3.0, 9.0, 9.0), (3.0, 9.0, 9.0)]):
        report(planner, 0, window, norms, members=(0,))
        if window == 1:
            assert planner.plan.choices == (HEAVY, Choice("onebit", 512.0), Choice("int", 8.0))
    assert planner.plan.choices == (HEAVY, Choice("onebit", 2048.0), Choice("int", 2.0))
    assert [event["codecs"] for event in planner.events()][-1] == ["topk", "int"]


def test_policies_do_not_see_buffers():
    """They have no norms, and nobody waits for them; in a plan they have a place all the same, and the log leaves them out."""
    rows = [LAYOUT.tensors[0], Tensor("moving", (9,), "float32", buffer=True), *LAYOUT.tensors[1:]]
    layout = Layout(rows, num_shards=2, partition_elements=1024)
    policy = Recorder()
    report(Planner(0, layout, policy), 0, 0, (1.0, NAN, 2.0, 3.0), members=(0,))
    assert policy.windows[0].norms.tolist() == [[1.0, 2.0, 3.0]]
    planner = Planner.for_layout(0, layout, SETTINGS)
    for window, norms in enumerate([(4.0, NAN, 4.0, 4.0), (3.0, NAN, 9.0, 4.0)]):
        report(planner, 0, window, norms, members=(0,))
    assert planner.plan.choices == (HEAVY, LIGHT, LIGHT, HEAVY)
    assert planner.plan.critical == (False, True, True, False)
    event = planner.events()[-1]
    assert event["reason"] == "check at window 1: 1 of 3 tensors critical"
    assert (event["names"], event["ratio"]) == (["a.weight", "b.weight"], [0.25, 0.0])
    version, plan = planner.pending([0])
    assert decode_plan(plan, 4) == planner.plan
    assert version == 2


def test_a_grown_batch_travels_in_the_plan_and_is_renewed_with_it():
    """From the decision to the bytes, and into the log; light for all means one batch."""
    regime = RegimeSettings(interval=10_000, window="10 steps", batch_multiplier=8)
    grown = Decision((HEAVY,) * 3, (False,) * 3, "grown", 8)
    policy = Recorder(windows=[grown], rates=[None])
    planner = Planner(0, LAYOUT, policy)
    for window in range(MIN_LIFE_ROUNDS // 10):
        report(planner, 0, window, members=(0,))
    assert planner.plan.reason == "renewed"
    assert decode_plan(planner.pending([0])[1], 3).batch_multiplier == 8
    assert {event["batch_multiplier"] for event in planner.events()} == {8}
    planner.report(1, window=10**6, round_=10**7, norms=np.ones(3, np.float32), rate=NAN, loss=NAN, members=(0, 1))
    assert (planner.plan.reason, planner.plan.batch_multiplier) == ("a member joined", 1)
    assert Planner.for_layout(0, LAYOUT, Settings(regime=regime))._policy.batch_multiplier == 8


def test_static_makes_no_plan():
    """Under the static policy all stay at version 0, which is light."""
    settings = Settings(regime=RegimeSettings(policy="static"))
    planner = Planner.for_layout(0, LAYOUT, settings)
    for window in range(3):
        for slot in (0, 1):
            report(planner, slot, window, rate=0.1 / (1 + window))
    assert planner.plan is None
    assert planner.pending([0, 0]) is None
    assert planner.critical_share == 1.0


def test_an_unknown_policy_is_refused_when_the_layout_is_declared():
    """A planner is not built from settings that name no policy."""
    with pytest.raises(ConfigError, match="not a policy"):
        Planner.for_layout(0, LAYOUT, Settings(regime=RegimeSettings(policy="acordion")))
