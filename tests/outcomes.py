"""An outcome of a small run, for the tests of how runs end."""

from ps_accordion.launcher.outcome import Outcome

KINDS = {"coordinator": "coordinator", "server 0": "server", "worker 0": "worker", "worker 1": "worker"}


def make(*, restarts: int = 0, minimum: int = 1) -> Outcome:
    """Return one in which everybody has been started at 0, and all have joined."""
    outcome = Outcome(KINDS, grace=5.0, restarts=restarts, minimum=minimum)
    outcome.joined = True
    for name in KINDS:
        outcome.started(name, 0.0)
    return outcome


def end_all(outcome: Outcome, code: int, now: float) -> None:
    """Have everybody who lives end with one code."""
    for name in outcome.alive:
        outcome.exited(name, code, now)
