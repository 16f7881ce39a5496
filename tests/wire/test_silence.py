"""Who falls silent is named once, within seconds, and once more when that is over."""

from ps_accordion.wire.actions import Note
from ps_accordion.wire.silence import AWAY_S, Absence, Silence


def test_silence_is_said_once_and_its_end_too():
    """After five heartbeats; the end says how long it was."""
    silence = Silence(0.4)
    assert silence.look({"worker 0": 10.0, "server 1": 10.0}, 12.0) == []
    assert silence.look({"worker 0": 12.0, "server 1": 10.0}, 12.1) == [Note("silent", {"name": "server 1", "since_s": 2.1})]
    assert silence.look({"worker 0": 12.2, "server 1": 10.0}, 13.0) == []
    assert silence.look({"worker 0": 12.9, "server 1": 13.5}, 13.6) == [Note("heard", {"name": "server 1", "after_s": 3.6})]
    assert silence.look({"worker 0": 13.6, "server 1": 13.6}, 15.6) == []


def test_who_leaves_is_not_silent_any_more():
    """Nobody waits for it."""
    silence = Silence(0.4)
    silence.look({"worker 0": 10.0}, 13.0)
    assert silence.look({}, 14.0) == [Note("heard", {"name": "worker 0", "after_s": 4.0})]
    assert silence.look({}, 15.0) == []


def test_a_peer_that_spoke_once_and_fell_silent_again_is_named_again():
    """Two silences are two, also where nobody looked in between."""
    silence = Silence(0.4)
    silence.look({"worker 0": 10.0}, 13.0)
    assert [note.event for note in silence.look({"worker 0": 13.5}, 16.0)] == ["heard", "silent"]


def test_who_was_away_knows_for_how_long():
    """Looks that come ten times a second are none; what lies between two that do not is said once."""
    absence = Absence(10.0)
    assert [absence.look(now) for now in (10.1, 10.2, 10.2 + AWAY_S)] == [0.0, 0.0, 0.0]
    assert absence.look(71.2) == 60.0
    assert absence.look(71.3) == 0.0
