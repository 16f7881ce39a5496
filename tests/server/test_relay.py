"""The relay: parts of a model's state find their way from the donor to those who ask."""

from ps_accordion.server.relay import Relay
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

STATE = m.State(0, -1, 5, 9, "d" * 16, [3])


def get(slot: int, part: int = 5, *, round_: int = -1, layout: int = 0) -> m.Get:
    """Return what a joiner asks."""
    return m.Get(slot, slot + 1, 0, layout, round_, part)


def relay_with_donor() -> Relay:
    relay = Relay()
    relay.hello(b"donor", m.Hello(0, 1))
    return relay


def test_a_greeting_is_echoed() -> None:
    """Unchanged, to whom it came from: that is how a worker knows that the server is there."""
    assert Relay().hello(b"x", m.Hello(3, 4)) == [Send((b"x",), m.Hello(3, 4))]


def test_a_part_is_asked_for_once_and_handed_to_all() -> None:
    """However many joiners ask, the donor's link carries it once."""
    relay = relay_with_donor()
    assert relay.get(b"one", get(1)) == [Send((b"donor",), get(1))]
    assert relay.get(b"two", get(2)) == []
    assert relay.get(b"three", get(3)) == []
    (send,) = relay.state(STATE, [b"abc"])
    assert (set(send.peers), send.message, send.payload) == ({b"one", b"two", b"three"}, STATE, (b"abc",))


def test_nothing_is_kept() -> None:
    """An answer that nobody waits for goes nowhere, and who asks later makes the donor answer anew."""
    relay = relay_with_donor()
    assert relay.state(STATE, [b"abc"]) == []
    relay.get(b"one", get(1))
    relay.state(STATE, [b"abc"])
    assert relay.state(STATE, [b"abc"]) == []
    assert relay.get(b"two", get(2)) == [Send((b"donor",), get(2))]


def test_a_joiner_that_asks_again_is_passed_on_again() -> None:
    """The request or its answer was lost: a repetition must reach the donor."""
    relay = relay_with_donor()
    relay.get(b"one", get(1))
    relay.get(b"two", get(2))
    assert relay.get(b"one", get(1)) == [Send((b"donor",), get(1))]


def test_a_request_before_the_donor_has_greeted_is_answered_on_repetition() -> None:
    """Start order does not matter: it waits, and the joiner asks again."""
    relay = Relay()
    assert relay.get(b"one", get(1)) == []
    relay.hello(b"donor", m.Hello(0, 1))
    assert relay.get(b"one", get(1)) == [Send((b"donor",), get(1))]


def test_parts_layouts_and_rounds_are_kept_apart() -> None:
    """Who waits for part 5 does not get part 6, nor part 5 of another model or of the state after another join."""
    relay = relay_with_donor()
    relay.get(b"one", get(1))
    assert relay.state(m.State(0, -1, 6, 9, "d" * 16, [3]), [b"abc"]) == []
    assert relay.state(m.State(1, -1, 5, 9, "d" * 16, [3]), [b"abc"]) == []
    assert relay.state(m.State(0, 40, 5, 9, "d" * 16, [3]), [b"abc"]) == []
    assert relay.state(STATE, [b"abc"])[0].peers == (b"one",)


def test_each_join_has_a_state_of_its_own() -> None:
    """What was asked for and never came does not hold back the same part of a later state, nor is it kept."""
    relay = relay_with_donor()
    relay.get(b"one", get(1, round_=40))
    relay.get(b"one", get(1, round_=40, layout=1))
    assert relay.get(b"two", get(2, round_=90)) == [Send((b"donor",), get(2, round_=90))]
    (send,) = relay.state(m.State(0, 90, 5, 9, "d" * 16, [3]), [b"abc"])
    assert send.peers == (b"two",)
    assert relay.state(m.State(0, 40, 5, 9, "d" * 16, [3]), [b"abc"]) == []
    (send,) = relay.state(m.State(1, 40, 5, 9, "d" * 16, [3]), [b"abc"])
    assert send.peers == (b"one",)


def test_whom_a_join_names_is_asked() -> None:
    """The state that training starts from comes from the donor of the view, a later one from whoever trained last."""
    relay = relay_with_donor()
    relay.hello(b"last", m.Hello(2, 3))
    ask = m.Get(1, 2, 2, 0, 40, 0)
    assert relay.get(b"one", ask) == [Send((b"last",), ask)]


def test_a_donor_that_connects_anew_is_found() -> None:
    """Its last greeting counts."""
    relay = relay_with_donor()
    relay.hello(b"donor again", m.Hello(0, 1))
    assert relay.get(b"one", get(1))[0].peers == (b"donor again",)


def test_a_late_greeting_of_a_dead_process_takes_no_route_away():
    """Found by simulation: the donor could not be asked any more, and whoever joined waited for ever."""
    relay = Relay()
    relay.hello(b"new", m.Hello(0, 4))
    relay.hello(b"dead", m.Hello(0, 1))
    (send,) = relay.get(b"joiner", m.Get(1, 5, 0, 0, 3, 0))
    assert send.peers == (b"new",)


def test_a_member_that_pushes_is_known_until_it_greets():
    """A server that was started again hears pushes before a greeting; a greeting has the last word."""
    relay = Relay()
    relay.heard(b"first", 0)
    relay.heard(b"second", 0)
    assert relay.name_of(b"first") == "worker 0"
    relay.hello(b"third", m.Hello(0, 2))
    relay.heard(b"first", 0)
    assert relay.name_of(b"first") == ""
    assert relay.name_of(b"third") == "worker 0"
