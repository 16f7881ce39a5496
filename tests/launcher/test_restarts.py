"""Who is started again, how soon, and how often; and whose death ends the run all the same."""

import signal

import pytest
from outcomes import KINDS, end_all, make

from ps_accordion.errors import RunAborted
from ps_accordion.launcher.outcome import Lost, Order, Outcome, Phase, Restart, Start


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_child_is_started_again_after_a_pause(name):
    """Whatever its role. While it waits, nothing ends the run, and it is not among the living."""
    outcome = make(restarts=3)
    assert outcome.exited(name, 137, 1.0) == [Restart(name, 1, 0.1)]
    assert (outcome.phase, outcome.cause, outcome.deadline) == (Phase.RUNNING, None, 1.1)
    assert name not in outcome.alive
    assert outcome.tick(1.09) == []
    assert outcome.tick(1.1) == [Start(name, 1)]
    assert (outcome.deadline, outcome.codes, set(outcome.alive)) == (None, {}, set(KINDS))
    outcome.started(name, 1.1)
    for other in ("worker 0", "worker 1", "coordinator", "server 0"):
        assert outcome.exited(other, 0, 2.0) == []
    assert (outcome.phase, outcome.exit_code, outcome.codes) == (Phase.DONE, 0, dict.fromkeys(KINDS, 0))


def test_pauses_double_up_to_ten_seconds():
    """A child that is killed every time is looked at less and less often, and each start says how many there were."""
    outcome = make(restarts=10)
    now, pauses = 1.0, []
    for number in range(1, 11):
        [restart] = outcome.exited("worker 0", 139, now)
        assert (restart.name, restart.number) == ("worker 0", number)
        pauses.append(restart.pause)
        now += restart.pause
        assert outcome.tick(now) == [Start("worker 0", number)]
        outcome.started("worker 0", now)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10])


@pytest.mark.parametrize("name", ["coordinator", "server 0"])
def test_at_the_last_restart_the_death_of_a_role_is_a_failure(name):
    """The run fails as if there were no restarts; other children's deaths do not count."""
    outcome = make(restarts=2)
    assert outcome.exited("worker 0", 137, 0.5) == [Restart("worker 0", 1, 0.1)]
    for number in (1, 2):
        assert outcome.exited(name, 137, float(number)) == [Restart(name, number, 0.1 * number)]
        outcome.tick(number + 0.5)
        outcome.started(name, number + 0.5)
    assert outcome.exited(name, 137, 3.0) == []
    assert (outcome.phase, outcome.cause, outcome.exit_code) == (Phase.FAILING, name, 137)
    [order] = outcome.tick(8.0)
    assert (order.number, set(order.members)) == (signal.SIGTERM, KINDS.keys() - {name})


def _use_up(outcome: Outcome, name: str, now: float) -> list[object]:
    """Kill a child until it is not started again; return what follows from the last time."""
    while isinstance((actions := outcome.exited(name, 137, now))[0], Restart):
        now += 10.0
        assert outcome.tick(now) == [Start(name, actions[0].number)]
        outcome.started(name, now)
    return actions


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_worker_at_its_last_restart_is_lost_and_the_others_go_on(restarts):
    """As long as they are enough; the run then ends with that worker's code, whatever comes after."""
    outcome = make(restarts=restarts)
    assert _use_up(outcome, "worker 0", 1.0) == [Lost("worker 0", 1, 1)]
    assert (outcome.phase, outcome.deadline, outcome.lost) == (Phase.RUNNING, None, ["worker 0"])
    assert outcome.states(99.0) == dict.fromkeys(KINDS, "") | {"worker 0": "lost"}
    for name in ("worker 1", "coordinator", "server 0"):
        assert outcome.exited(name, 0, 100.0) == []
    assert (outcome.phase, outcome.exit_code, outcome.cause, outcome.ender) == (Phase.DONE, 137, "worker 0", None)


def test_a_worker_is_lost_when_the_others_have_finished():
    """They count as there: they have done what they were for."""
    outcome = make(minimum=2)
    outcome.exited("worker 1", 0, 1.0)
    assert outcome.exited("worker 0", 139, 1.5) == [Lost("worker 0", 1, 2), Order(signal.SIGTERM, ("coordinator", "server 0"))]
    outcome = make(minimum=1)
    outcome.exited("worker 1", 0, 1.0)
    assert outcome.exited("worker 0", 139, 1.5) == [Lost("worker 0", 1, 1)]
    assert outcome.phase is Phase.DRAINING


def test_below_the_minimum_the_run_ends_at_once():
    """Nobody could come back, so nobody is waited for; those who wait to be started again are not."""
    outcome = make(restarts=1, minimum=2)
    outcome.exited("server 0", 137, 0.9)
    outcome.exited("worker 0", 137, 1.0)
    outcome.tick(1.1)
    outcome.started("worker 0", 1.1)
    outcome.started("server 0", 1.1)
    assert outcome.exited("worker 1", 137, 1.15) == [Restart("worker 1", 1, 0.1)]
    actions = outcome.exited("worker 0", 137, 1.2)
    assert actions == [Lost("worker 0", 1, 2), Order(signal.SIGTERM, ("coordinator", "server 0"))]
    assert outcome.tick(2.0) == []
    end_all(outcome, 143, 2.1)
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, 137, "worker 0")


def test_before_all_have_joined_every_worker_is_needed():
    """The first view has all of them: the others would wait for one that never comes."""
    outcome = make()
    outcome.joined = False
    assert outcome.exited("worker 0", 137, 1.0) == [
        Lost("worker 0", 1, 2),
        Order(signal.SIGTERM, ("coordinator", "server 0", "worker 1")),
    ]


def test_the_last_worker_takes_the_run_with_it():
    """Whatever the minimum."""
    outcome = make()
    outcome.exited("worker 0", 137, 1.0)
    assert outcome.exited("worker 1", 139, 2.0) == [
        Lost("worker 1", 0, 1),
        Order(signal.SIGTERM, ("coordinator", "server 0")),
    ]
    end_all(outcome, 143, 2.1)
    assert (outcome.phase, outcome.exit_code, outcome.cause, outcome.ender) == (Phase.DONE, 137, "worker 0", None)


def test_a_failure_after_a_worker_was_lost_is_told_too():
    """The code is that of the first failure; what ended the run is another's error."""
    outcome = make()
    outcome.exited("worker 0", 137, 1.0)
    outcome.exited("worker 1", 1, 9.0)
    end_all(outcome, RunAborted.exit_code, 9.1)
    assert (outcome.exit_code, outcome.cause, outcome.ender) == (137, "worker 0", "worker 1")


def test_a_lost_worker_that_the_coordinator_names_has_ended_the_run():
    """The others could not go on without it, and their scripts raise because of that."""
    outcome = make()
    outcome.exited("worker 0", 137, 1.0)
    outcome.exited("worker 1", 1, 9.0)
    outcome.accused("worker 0", 8.9)
    end_all(outcome, RunAborted.exit_code, 9.1)
    assert (outcome.exit_code, outcome.cause, outcome.ender) == (137, "worker 0", "worker 0")


def test_a_minute_of_life_forgets_what_was_before():
    """The count and the pauses begin anew; the child still learns how often it was started in all."""
    outcome = make(restarts=1)
    now = 0.0
    for number in (1, 2, 3):
        now += 60.0
        assert outcome.exited("worker 0", 137, now) == [Restart("worker 0", 1, 0.1)]
        now += 1.0
        assert outcome.tick(now) == [Start("worker 0", number)]
        outcome.started("worker 0", now)
    assert outcome.exited("worker 0", 137, now + 59.9) == [Lost("worker 0", 1, 1)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("code", [1, 3, RunAborted.exit_code, 255])
def test_a_child_that_ends_by_itself_has_said_how_the_run_ends(name, code):
    """An exception, `sys.exit(3)` or a code of ours would come again: the run fails at once."""
    outcome = make(restarts=3)
    assert outcome.exited(name, code, 1.0) == []
    assert (outcome.phase, outcome.exit_code) == (Phase.FAILING, code)


def test_a_worker_that_has_ended_well_is_done():
    """It is not started again, also where another is."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 0, 1.0)
    outcome.exited("worker 1", 137, 1.0)
    assert outcome.tick(99.0) == [Start("worker 1", 1)]
    outcome.exited("worker 1", 0, 100.0)
    assert outcome.phase is Phase.DRAINING


def _draining(outcome: Outcome) -> None:
    outcome.exited("worker 0", 0, 1.0)
    outcome.exited("worker 1", 0, 1.0)


@pytest.mark.parametrize(
    ("ends", "phase"),
    [
        (lambda outcome: outcome.exited("worker 0", 3, 1.0), Phase.FAILING),
        (_draining, Phase.DRAINING),
        (lambda outcome: outcome.interrupted(signal.SIGINT, 1.0), Phase.INTERRUPTED),
        (lambda outcome: (outcome.exited("worker 0", 3, 1.0), outcome.tick(6.0)), Phase.TERMINATING),
        (lambda outcome: (outcome.interrupted(2, 1.0), outcome.interrupted(2, 1.0)), Phase.KILLING),
    ],
)
def test_nobody_is_started_again_once_the_run_is_ending(ends, phase):
    """In every phase but the first a death is what it was without restarts."""
    outcome, without = make(restarts=3), make()
    for each in (outcome, without):
        ends(each)
        assert each.phase is phase
    for name in outcome.alive:
        assert outcome.exited(name, 137, 7.0) == without.exited(name, 137, 7.0)
        assert outcome.tick(99.0) == without.tick(99.0)
        assert (outcome.phase, outcome.cause, outcome.exit_code) == (without.phase, without.cause, without.exit_code)


def test_an_interrupt_during_a_pause_ends_at_once():
    """Who waits is not started, and that it died was no failure."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 137, 1.0)
    assert outcome.interrupted(signal.SIGINT, 1.05) == [Order(signal.SIGINT, ("worker 1",))]
    assert outcome.tick(1.2) == []
    end_all(outcome, 130, 1.2)
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, 130, None)


def test_an_interrupt_while_all_workers_wait_ends_the_roles():
    """Nobody is left who could be asked first."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 137, 1.0)
    outcome.exited("worker 1", 137, 1.0)
    assert outcome.interrupted(signal.SIGTERM, 1.05) == [Order(signal.SIGTERM, ("coordinator", "server 0"))]


def test_an_interrupt_while_everybody_waits_is_the_end():
    """There is nothing to wait for."""
    outcome = make(restarts=3)
    for name in KINDS:
        assert outcome.exited(name, 137, 1.0) == [Restart(name, 1, 0.1)]
    assert outcome.phase is Phase.RUNNING
    assert outcome.interrupted(signal.SIGINT, 1.05) == []
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, 130, None)


def test_states_say_what_is_the_matter():
    """Nothing with who lives or has ended well; a pause counts down."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 137, 1.0)
    outcome.exited("worker 1", 0, 1.0)
    assert outcome.states(1.04) == dict.fromkeys(KINDS, "") | {"worker 0": "restarting in 0.1 s, 1 of 3"}
    outcome.exited("server 0", 8, 1.05)
    assert outcome.states(1.06)["server 0"] == "ended with 8"


def test_a_failure_during_a_pause_is_the_cause():
    """The one that waited would have come back; the other one has ended the run."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 137, 1.0)
    assert outcome.exited("worker 1", 3, 1.05) == []
    assert outcome.tick(1.2) == []
    end_all(outcome, RunAborted.exit_code, 1.3)
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, 3, "worker 1")


@pytest.mark.parametrize("accused", [False, True])
def test_who_waits_is_the_cause_where_others_ended_because_of_it(accused):
    """Code 5 says that another failed first, and the coordinator may say who."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 137, 1.0)
    outcome.exited("coordinator", RunAborted.exit_code, 1.05)
    end_all(outcome, 1 if accused else RunAborted.exit_code, 1.3)
    if accused:
        outcome.accused("worker 0", 1.02)
    assert (outcome.phase, outcome.exit_code, outcome.cause) == (Phase.DONE, 137, "worker 0")


def test_a_role_that_waits_when_the_workers_have_ended_is_a_failure():
    """It cannot finish any more: what it held is gone, and nobody would look at it."""
    outcome = make(restarts=3)
    outcome.exited("worker 0", 0, 1.0)
    outcome.exited("server 0", 137, 1.0)
    assert outcome.exited("worker 1", 0, 1.05) == []
    assert (outcome.phase, outcome.cause, outcome.exit_code) == (Phase.FAILING, "server 0", 137)
    assert outcome.tick(1.2) == []


def test_the_last_one_alive_may_end_while_another_waits():
    """The run goes on when the pause is over."""
    outcome = Outcome({"worker 0": "worker", "worker 1": "worker"}, grace=5.0, restarts=1)
    outcome.exited("worker 0", 137, 1.0)
    outcome.exited("worker 1", 0, 1.05)
    assert (outcome.phase, outcome.alive) == (Phase.RUNNING, ())
    assert outcome.tick(1.1) == [Start("worker 0", 1)]
    outcome.exited("worker 0", 0, 2.0)
    assert (outcome.phase, outcome.exit_code) == (Phase.DONE, 0)
