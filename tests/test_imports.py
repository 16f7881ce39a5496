"""The garbage collector while modules load."""

import gc

import pytest

from ps_accordion.imports import collection_paused


@pytest.fixture(params=[True, False], ids=["on", "off"])
def was_on(request: pytest.FixtureRequest):
    """Set the collector to a state, and back at the end."""
    before = gc.isenabled()
    gc.enable() if request.param else gc.disable()
    yield request.param
    gc.enable() if before else gc.disable()


def test_the_collector_rests_inside_and_is_as_it_was_afterwards(was_on: bool) -> None:
    """A training script that runs without it keeps running without it."""
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() is was_on


def test_the_collector_is_as_it_was_after_an_error_too(was_on: bool) -> None:
    """A module that cannot be loaded must not leave a process that never collects."""
    with pytest.raises(ImportError), collection_paused():
        raise ImportError
    assert gc.isenabled() is was_on
