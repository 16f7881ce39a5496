"""Which cases of a test run each time, and which the longer suites alone: a run of several processes takes seconds."""

from collections.abc import Iterable

import pytest

__all__ = ["usually"]


def usually(cases: Iterable[str | tuple], *usual: str | tuple) -> list:
    """Return parameters, of one argument or several, of which `usual` run each time and the others in `make test-full`."""
    return [
        case if case in usual else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
        for case in cases
    ]
