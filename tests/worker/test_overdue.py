"""A worker knows which servers it waits for, and since when."""

from types import SimpleNamespace

from machines import Member, layout_of, settings_of, view_of

from ps_accordion.worker.overdue import Overdue
from ps_accordion.worker.pushes import server_name
from ps_accordion.worker.rounds import Rounds

SETTINGS = settings_of(servers_count=2)
LAYOUT = layout_of(SETTINGS)
SERVERS = {server_name(key.shard, SETTINGS) for key in LAYOUT.keys}


def pushed(rounds: Rounds) -> Rounds:
    """Push every key of the open round."""
    member = Member(0, SETTINGS, LAYOUT)
    for key in LAYOUT.keys:
        push, _ = member.bare("UNUSED", key.number, rounds.round)
        rounds.pushed(push, None, 0.0)
    return rounds


def test_servers_are_waited_for_since_all_was_pushed():
    """Not while the worker computes; and anew with every round."""
    rounds, overdue = Rounds(0, LAYOUT, SETTINGS), Overdue()
    rounds.view = view_of(SETTINGS)
    exchanges = {0: SimpleNamespace(rounds=rounds)}
    assert len(SERVERS) == 2
    assert overdue.look(exchanges, 10.0) == {}
    pushed(rounds)
    assert overdue.look(exchanges, 11.0) == {}
    assert overdue.look(exchanges, 14.0) == dict.fromkeys(SERVERS, 11.0)
    rounds.round, rounds.pushes.sent = 1, {}
    assert overdue.look(exchanges, 15.0) == {}
    pushed(rounds)
    assert overdue.look(exchanges, 16.0) == {}
    assert overdue.look(exchanges, 17.0) == dict.fromkeys(SERVERS, 16.0)


def test_a_server_that_has_answered_everything_is_not_waited_for():
    """The other one is, and is the one to look at."""
    rounds, overdue = pushed(Rounds(0, LAYOUT, SETTINGS)), Overdue()
    first = server_name(LAYOUT.keys[0].shard, SETTINGS)
    rounds._results = {key.number: None for key in LAYOUT.keys if server_name(key.shard, SETTINGS) == first}
    exchanges = {0: SimpleNamespace(rounds=rounds)}
    overdue.look(exchanges, 10.0)
    assert overdue.look(exchanges, 12.0) == dict.fromkeys(SERVERS - {first}, 10.0)
