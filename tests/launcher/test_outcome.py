import signal

import pytest
from outcomes import KINDS, end_all, make

from ps_accordion.errors import PsAccordionError, RunAborted
from ps_accordion.launcher.outcome import Order, Phase, killed_by


def test_a_run_in_which_all_end_with_zero_ends_with_zero():
    """Success is every worker at 0, and then the coordinator and servers at 0."""
    outcome = make()
    for name in ("worker 0", "worker 1", "coordinator", "server 0"):
        assert outcome.phase is not Phase.DONE
        assert outcome.exited(name, 0, 1.0) == []
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, 0, None)


def test_roles_that_finish_before_the_workers_are_no_event():
    """The coordinator and servers may end first: a worker still saves its model."""
    outcome = make()
    outcome.exited("coordinator", 0, 1.0)
    outcome.exited("server 0", 0, 1.0)
    assert (outcome.phase, outcome.deadline) == (Phase.RUNNING, None)


def test_the_first_failure_gives_the_exit_code():
    """The exit code is that of the child that failed first in time."""
    outcome = make()
    outcome.exited("worker 1", 3, 1.0)
    outcome.exited("worker 0", 1, 2.0)
    end_all(outcome, 1, 3.0)
    assert (outcome.exit_code, outcome.cause) == (3, "worker 1")


def test_a_child_that_reports_an_aborted_run_is_not_the_cause():
    """Servers often end, with 5, before the interpreter of the failed worker has shut down."""
    outcome = make()
    outcome.exited("server 0", RunAborted.exit_code, 1.0)
    outcome.exited("worker 0", 7, 1.5)
    end_all(outcome, RunAborted.exit_code, 2.0)
    assert (outcome.exit_code, outcome.cause) == (7, "worker 0")


def test_whom_the_coordinator_named_is_the_cause_even_if_others_end_sooner():
    """A script that is told of the end raises, often before the interpreter of the failed worker has shut down."""
    outcome = make()
    outcome.exited("worker 0", 1, 2.0)
    outcome.exited("worker 1", 3, 2.5)
    end_all(outcome, RunAborted.exit_code, 3.0)
    outcome.accused("worker 1", 1.9)
    assert (outcome.exit_code, outcome.cause) == (3, "worker 1")


def test_whom_the_coordinator_named_after_the_first_end_is_not_the_cause():
    """A worker that was killed told nobody; the one that stumbled over it reported first, but failed second."""
    outcome = make()
    outcome.exited("server 0", 137, 2.0)
    outcome.exited("worker 1", 1, 2.5)
    end_all(outcome, RunAborted.exit_code, 3.0)
    outcome.accused("worker 1", 2.2)
    assert (outcome.exit_code, outcome.cause) == (137, "server 0")


def test_whom_the_coordinator_named_is_the_cause_even_if_it_was_slow_to_end():
    """An interpreter with much to tidy up may outlast the grace: the signal that ends it is ours, and says nothing."""
    outcome = make()
    outcome.exited("coordinator", RunAborted.exit_code, 2.0)
    outcome.exited("worker 0", RunAborted.exit_code, 2.1)
    outcome.tick(7.0)
    outcome.exited("worker 1", 143, 7.1)
    outcome.exited("server 0", 143, 7.2)
    outcome.accused("worker 1", 1.9)
    assert (outcome.exit_code, outcome.cause) == (1, "worker 1")


def test_an_aborted_run_that_nobody_explains_keeps_its_code():
    """Where every failure is an aborted run, its code is still not 0."""
    outcome = make()
    outcome.exited("worker 0", 0, 1.0)
    end_all(outcome, RunAborted.exit_code, 1.0)
    assert (outcome.exit_code, outcome.cause) == (RunAborted.exit_code, "coordinator")


def test_after_a_failure_others_get_grace_then_sigterm_then_sigkill():
    """Nobody is signalled before the grace is over, and nobody survives two graces."""
    outcome = make()
    assert outcome.exited("worker 0", 3, 10.0) == []
    assert outcome.tick(14.9) == []
    rest = ("coordinator", "server 0", "worker 1")
    assert outcome.tick(15.0) == [Order(signal.SIGTERM, rest)]
    assert outcome.tick(19.9) == []
    assert outcome.tick(20.0) == [Order(signal.SIGKILL, rest)]
    end_all(outcome, 137, 20.1)
    assert (outcome.phase, outcome.exit_code) == (Phase.DONE, 3)


def test_roles_that_do_not_finish_after_the_workers_make_a_failure():
    """Workers that never connected must not look like a run that went well."""
    outcome = make()
    outcome.exited("worker 0", 0, 1.0)
    outcome.exited("worker 1", 0, 1.0)
    assert outcome.tick(6.0) == [Order(signal.SIGTERM, ("coordinator", "server 0"))]
    end_all(outcome, 143, 6.1)
    assert outcome.stuck == ("coordinator", "server 0")
    assert (outcome.exit_code, outcome.cause) == (PsAccordionError.exit_code, None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_asks_the_workers_first_and_gives_its_own_exit_code(number, code):
    """What children end with after an interrupt is not a failure of theirs."""
    outcome = make()
    assert outcome.interrupted(number, 1.0) == [Order(number, ("worker 0", "worker 1"))]
    assert outcome.exited("worker 0", 1, 1.1) == []
    assert outcome.exited("worker 1", 130, 1.2) == [Order(signal.SIGTERM, ("coordinator", "server 0"))]
    end_all(outcome, 143, 1.3)
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, code, None)


def test_a_second_interrupt_kills_at_once():
    """Somebody who presses Ctrl-C twice does not want to wait."""
    outcome = make()
    outcome.interrupted(signal.SIGINT, 1.0)
    assert outcome.interrupted(signal.SIGINT, 1.1) == [Order(signal.SIGKILL, tuple(KINDS))]


def test_an_interrupt_after_a_failure_keeps_the_failures_code():
    """The failure came first, so it is what the exit code tells."""
    outcome = make()
    outcome.exited("worker 0", 3, 1.0)
    assert outcome.interrupted(signal.SIGINT, 1.5) == [Order(signal.SIGTERM, ("coordinator", "server 0", "worker 1"))]
    end_all(outcome, 143, 2.0)
    assert outcome.exit_code == 3


@pytest.mark.parametrize(
    ("code", "name"), [(137, "SIGKILL"), (129, "SIGHUP"), (130, "SIGINT"), (128 + 40, "signal 40"), (128 + 64, "SIGRTMAX")]
)
def test_a_code_above_128_is_a_signal(code, name):
    """As a shell has it; those in the middle of the real-time signals have no name."""
    assert killed_by(code) == name


@pytest.mark.parametrize("code", [0, 1, 127, 128, 128 + 65, 255])
def test_other_codes_are_not(code):
    """`sys.exit(-1)` ends with 255, and that is a verdict."""
    assert killed_by(code) is None
