"""From a name in the configuration to a policy.

A new policy is one file beside this one, one line in `_BUILDERS` and a paragraph in docs/regimes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..config import RegimeSettings
from ..errors import ConfigError
from ..sources import nearest
from .accordion import Accordion
from .base import Choice, Policy
from .span import parse_span
from .static import Static

__all__ = ["build_policy", "check_settings", "policy_names"]

Builder = Callable[[RegimeSettings, Sequence[Choice], Sequence[Choice]], Policy]


def _static(settings: RegimeSettings, light: Sequence[Choice], heavy: Sequence[Choice]) -> Policy:
    return Static(light=light, heavy=heavy)


def _accordion(settings: RegimeSettings, light: Sequence[Choice], heavy: Sequence[Choice]) -> Policy:
    return Accordion(
        light=light,
        heavy=heavy,
        threshold=settings.threshold,
        interval=settings.interval,
        signal=settings.signal,
        rate_drop=settings.rate_drop,
        batch_multiplier=settings.batch_multiplier,
    )


_BUILDERS: Mapping[str, Builder] = {"accordion": _accordion, "static": _static}


def policy_names() -> list[str]:
    """Return the names that `regime.policy` may have, sorted."""
    return sorted(_BUILDERS)


def check_settings(settings: RegimeSettings) -> None:
    """Refuse settings that name no policy or no window, before any process starts.

    Raises:
        ConfigError: What is legal, and the nearest name.
    """
    if settings.policy not in _BUILDERS:
        raise ConfigError(
            f"regime.policy = {settings.policy!r} is not a policy: expected one of {', '.join(policy_names())}"
            f"{nearest(settings.policy, policy_names())}"
        )
    parse_span(settings.window)


def build_policy(settings: RegimeSettings, *, light: Sequence[Choice], heavy: Sequence[Choice]) -> Policy:
    """Build the policy of one layout.

    Args:
        settings: `[regime]` of the job.
        light: Choice of each tensor in critical regimes and whenever in doubt.
        heavy: Choice of each elsewhere.

    Raises:
        ConfigError: No such policy, or the window is not legal.
    """
    check_settings(settings)
    return _BUILDERS[settings.policy](settings, light, heavy)
