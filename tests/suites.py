"""Which cases of a test run each time, and which the longer suites alone: a run of several processes takes seconds."""

from collections.abc import Iterable

import pytest

__all__ = ["usually"]


def usually(names: Iterable[str], *usual: str) -> list:
    """Return parameters of which `usual` run each time and the others in `make test-full`."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.full) for name in names]
