"""Who lends to whom: agreed whatever is lost, said once, and never more than the other side can read."""

import itertools
import os
import random

import pytest

from ps_accordion.errors import WireError
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send
from ps_accordion.wire.lending import REPEAT_S, Lending

ADDRESS = "ipc:///anywhere"
NBYTES = 1 << 17


class Pair:
    """A worker and a server, and what they say to each other; `passes` says what arrives."""

    def __init__(self, worker=None, server=None, passes=lambda: True) -> None:
        self.worker = worker or Lending(on=True)
        self.server = server or Lending(on=True)
        self.peer = b"1"
        self.now = 0.0
        self.passes = passes
        self.said = 0
        self.worker.begin("server 0", ADDRESS)

    def talk(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.now += REPEAT_S
            for send in self.worker.tick(self.now):
                self.said += 1
                for answer in self.server.on_lane(self.peer, send.message) if self.passes() else ():
                    if self.passes():
                        assert not self.worker.on_lane("server 0", answer.message)

    @property
    def ways(self) -> tuple[bool, bool]:
        """Whether pushes and results are lent."""
        return self.worker.reads("server 0"), self.server.reads(self.peer)

    def news(self) -> list:
        return [note.fields for note in self.worker.news()]

    def close(self) -> None:
        self.worker.close()
        self.server.close()


@pytest.fixture
def paired():
    made = []

    def make(**options) -> Pair:
        made.append(Pair(**options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()
        pair.close()  # twice is harmless


def push(nbytes: int = NBYTES) -> m.Push:
    return m.Push(0, 0, 0, 0, 1, "DATA", 1.0, 1, False, "dense", 32.0, nbytes // 4, nbytes // 4, 0, [nbytes])


def lent(lending: Lending, value: int = 3, nbytes: int = NBYTES):
    """Return a payload in the lane, and the message that lends it."""
    room = lending.take(nbytes)
    room[:] = value
    return room, lending.lent((push(nbytes), (room.data,)))


def test_both_lend_when_both_have_heard(paired):
    """Two questions and two answers; then nothing is said any more, but once in the log."""
    pair = paired()
    assert pair.ways == (False, False)
    assert pair.worker.take(NBYTES) is None, "nobody reads it yet"
    pair.talk()
    assert pair.ways == (True, False)
    assert pair.news() == []
    pair.talk()
    assert pair.ways == (True, True)
    assert pair.news() == [{"link": "server 0", "push": True, "pull": True, "reason": ""}]
    pair.talk(10)
    assert (pair.said, pair.news()) == (2, [])


@pytest.mark.parametrize("seed", range(5))
def test_loss_delays_an_agreement_and_changes_nothing(paired, seed):
    """Two thirds are lost."""
    chance = random.Random(seed)
    pair = paired(passes=lambda: chance.random() < 1 / 3)
    pair.talk(200)
    assert pair.ways == (True, True)
    assert pair.news() == [{"link": "server 0", "push": True, "pull": True, "reason": ""}]


@pytest.mark.parametrize(("worker", "server"), [(True, False), (False, True), (False, False)])
def test_who_has_it_off_takes_no_part(paired, worker, server):
    """Nor does the other side; it learns why, and that is the end of it."""
    pair = paired(worker=Lending(on=worker), server=Lending(on=server))
    pair.talk(5)
    assert pair.ways == (False, False)
    assert pair.news() == (
        [{"link": "server 0", "push": False, "pull": False, "reason": "servers.lane is off"}] if worker else []
    )
    assert pair.said == worker


def test_a_link_that_leaves_the_host_has_no_lane(paired):
    """It is said in the log, and nobody is asked, not even when the connection is new."""
    pair = paired()
    pair.worker.begin("server 0", "tcp://127.0.0.1:1")
    pair.talk(3)
    pair.worker.begin_again("server 0")
    pair.talk(3)
    assert (pair.said, pair.ways) == (0, (False, False))
    assert [note["reason"] for note in pair.news()] == ["its address is not ipc://"]


def test_memory_that_cannot_be_read_is_not_lent(paired, monkeypatch):
    """Another host behind the address, or a process that may not be looked at: all goes through the socket, and why is said."""
    pair = paired()
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 7)
    pair.talk(5)
    assert pair.ways == (False, False)
    (note,) = pair.news()
    assert not note["push"]
    assert not note["pull"]
    assert "memory cannot be read: [Errno 2]" in note["reason"]


def test_no_memory_to_share_is_said(paired, monkeypatch):
    """Where the kernel gives none, the other direction may still be lent."""
    pair = paired()
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", lambda *_: os.open("/there/is/no/such/file", os.O_RDONLY))
        pair.worker.said("server 0")
    pair.talk(5)
    assert pair.ways == (False, True)
    (note,) = pair.news()
    assert (note["push"], note["pull"]) == (False, True)
    assert "no memory can be shared" in note["reason"]


def test_a_payload_in_the_lane_is_lent_and_any_other_sent(paired):
    """Only of pushes and results, only what was taken from the lane; a plan behind a result goes with it."""
    pair = paired()
    pair.talk(2)
    room, (message, behind) = lent(pair.worker)
    assert isinstance(message, m.Lent)
    assert (message.message, behind) == (push(), ())
    ordinary = (push(), (bytes(NBYTES),))
    assert pair.worker.lent(ordinary) is ordinary
    replay = (m.Replay(1, push()), (room.data,))
    assert pair.worker.lent(replay) is replay
    (got, frames), loan = pair.server.borrowed(pair.peer, message, [b"plan"])
    assert got == push()
    assert [bytes(frame) for frame in frames] == [bytes([3]) * NBYTES, b"plan"]
    assert loan.verified()
    assert (pair.worker.lent_bytes, pair.server.borrowed_bytes) == (NBYTES, NBYTES)


def test_small_payloads_go_through_the_socket(paired):
    """To copy them takes no longer."""
    pair = paired()
    pair.talk(2)
    assert pair.worker.take(1000) is None


def test_bytes_that_are_not_what_was_lent_are_refused(paired):
    """By the checksum, as those of any message."""
    pair = paired()
    pair.talk(2)
    room, (message, _) = lent(pair.worker)
    room[NBYTES - 1] ^= 1
    _, loan = pair.server.borrowed(pair.peer, message, ())
    with pytest.raises(WireError, match=r"checksum .* of what lies in the lane"):
        loan.verified()


def test_a_message_that_comes_after_its_payload_has_gone_is_lost(paired):
    """Not an error: the memory holds something else by now, and whoever needs the answer asks again."""
    pair = paired()
    pair.talk(2)
    room, (message, _) = lent(pair.worker)
    place = room.ctypes.data
    del room
    again, (later, _) = lent(pair.worker, 4)
    assert again.ctypes.data == place
    assert pair.server.borrowed(pair.peer, message, ()) is None
    assert pair.server.borrowed(pair.peer, later, ()) is not None


def test_a_server_that_was_started_again_is_lent_to_anew(paired):
    """What it cannot read yet is lost and says so; what was lent by the process before stays readable to who holds it."""
    pair = paired()
    pair.talk(2)
    result = m.Result(0, 0, 0, 1, "DATA", 1, 0, "dense", 32.0, NBYTES // 4, NBYTES // 4, 0, [NBYTES])
    held = pair.server.take(NBYTES)
    held[:] = 8
    (_, frames), loan = pair.worker.borrowed("server 0", pair.server.lent((result, (held.data,)))[0], ())
    del held
    pair.server.close()
    pair.server, pair.peer = Lending(on=True), b"2"
    _room, (message, _) = lent(pair.worker)
    assert not pair.server.is_known(pair.peer, message)
    pair.worker.on_lane("server 0", pair.server.said(pair.peer))
    assert pair.ways == (False, False)
    pair.talk(2)
    assert pair.ways == (True, True)
    assert pair.server.is_known(pair.peer, message)
    assert pair.news() == [{"link": "server 0", "push": True, "pull": True, "reason": ""}]
    assert loan.stands
    assert bytes(frames[0]) == bytes([8]) * NBYTES


def test_a_connection_that_is_new_is_agreed_anew(paired):
    """The worker says so when it sees one; memory that is mapped is not mapped again."""
    pair = paired()
    pair.talk(2)
    mapped = pair.server._links[pair.peer].lane
    pair.worker.begin_again("server 0")
    pair.peer = b"2"
    assert pair.ways == (False, False)
    pair.talk(2)
    assert pair.ways == (True, True)
    assert pair.server._links[pair.peer].lane is mapped


def test_servers_let_go_of_workers_that_have_ended(paired, monkeypatch):
    """When the next one comes: workers come and go, and their memory must not stay."""
    pair = paired()
    pair.talk(2)
    monkeypatch.setattr("ps_accordion.wire.lending._is_gone", lambda process: True)
    for number in itertools.islice(itertools.count(2), 5):
        pair.peer = str(number).encode()
        pair.worker.begin_again("server 0")
        pair.talk(2)
    assert list(pair.server._links) == [b"6"]


def test_who_never_spoke_is_not_answered_by_a_worker(paired):
    """A link of another kind, such as the one to the coordinator."""
    pair = paired()
    assert pair.worker.on_lane("coordinator", m.Lane(5, 1, 1)) == []
    assert isinstance(pair.server.on_lane(b"9", m.Lane(5, 2**22 + 9, 1))[0], Send)
