"""Policies by name, and the settings that choose them."""

import numpy as np
import pytest

from ps_accordion.config import RegimeSettings
from ps_accordion.errors import ConfigError
from ps_accordion.regimes import Choice, Window, build_policy, check_settings, policy_names
from ps_accordion.regimes.accordion import Accordion
from ps_accordion.regimes.static import Static

LIGHT, HEAVY = Choice("topk", 0.04), Choice("topk", 0.005)


def test_every_name_builds_a_policy_that_starts_light():
    """Whatever the policy, the run starts at light compression with every tensor critical."""
    for name in policy_names():
        start = build_policy(RegimeSettings(policy=name), light=[LIGHT] * 3, heavy=[HEAVY] * 3).start()
        assert (start.choices, start.critical) == ((LIGHT,) * 3, (True,) * 3)


def test_options_of_accordion_come_from_the_settings():
    """Nothing that a user can set is lost on the way."""
    settings = RegimeSettings(threshold=0.3, interval=4, signal="released", rate_drop=0.2, batch_multiplier=6)
    policy = build_policy(settings, light=[LIGHT] * 3, heavy=[HEAVY] * 3)
    assert isinstance(policy, Accordion)
    assert (policy.threshold, policy.interval, policy.signal, policy.rate_drop) == (0.3, 4, "released", 0.2)
    assert policy.batch_multiplier == 6
    assert (policy.tensors, policy.light, policy.heavy) == (3, (LIGHT,) * 3, (HEAVY,) * 3)


def test_an_unknown_policy_is_refused_with_the_nearest():
    """A slip in the name is answered with what is legal."""
    with pytest.raises(
        ConfigError, match=r"'acordion' is not a policy: expected one of accordion, static \(did you mean 'accordion'"
    ):
        build_policy(RegimeSettings(policy="acordion"), light=[LIGHT], heavy=[HEAVY])


def test_a_window_that_is_no_span_is_refused_before_the_run():
    """The check needs no layout, so that a launcher can make it first."""
    check_settings(RegimeSettings())
    with pytest.raises(ConfigError, match="ten rounds"):
        check_settings(RegimeSettings(window="ten rounds"))


def test_static_never_decides():
    """No window and no learning rate makes a plan."""
    policy = build_policy(RegimeSettings(policy="static"), light=[LIGHT] * 2, heavy=[HEAVY] * 2)
    assert isinstance(policy, Static)
    one = np.ones(1)
    assert policy.window(Window(0, 9, np.ones((1, 2)), one, one, (0,))) is None
    assert policy.rate(0.1, 0) is None
    assert policy.rate(0.001, 50) is None
