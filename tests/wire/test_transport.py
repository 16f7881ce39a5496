"""Sockets on loopback: what arrives, what is counted, what is lost without harm, and what is left behind: nothing."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from ps_accordion.errors import ConfigError, WireError
from ps_accordion.wire import framing
from ps_accordion.wire import messages as m
from ps_accordion.wire.transport import Arrival, Transport

ANY = "tcp://127.0.0.1:*"
PATIENCE = 10.0
HELLO = m.Hello(1, 2)


@pytest.fixture
def transports() -> Iterator[Callable[..., Transport]]:
    made: list[Transport] = []

    def make(**options) -> Transport:
        made.append(Transport(**options))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def gather(transport: Transport, wanted: int) -> list[Arrival]:
    """Poll until `wanted` arrivals are there."""
    arrivals: list[Arrival] = []
    deadline = time.monotonic() + PATIENCE
    while len(arrivals) < wanted:
        assert time.monotonic() < deadline, f"{len(arrivals)} of {wanted} arrived: {arrivals}"
        arrivals += transport.poll(0.05)
    return arrivals


def meet(client: Transport, server: Transport, name: str = "server") -> bytes:
    """Send greetings until one arrives, and return the client's routing id: earlier ones are lost, nobody is there yet."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        client.send(name, HELLO)
        arrivals = server.poll(0.02)
        if arrivals:
            assert arrivals[0].message == HELLO
            return arrivals[0].peer
    raise AssertionError("nobody came")


class Proxy:
    """Passes bytes on between one client and a server, and counts them.

    ZMTP begins with a greeting of 64 bytes and a READY command from each side; `handshake` of them are not traffic.
    """

    def __init__(self, address: str) -> None:
        self.passed = {"up": 0, "down": 0}
        self._port = int(address.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        pumps = [threading.Thread(target=self._pump, args=ends) for ends in ((client, server, "up"), (server, client, "down"))]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        client.close()
        server.close()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                self.passed[way] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other end has gone already
            pass

    def close(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()


HANDSHAKE = {"up": 64 + 2 + 6 + 1 + 11 + 4 + 6 + 1 + 8 + 4, "down": 64 + 2 + 6 + 1 + 11 + 4 + 6 + 1 + 8 + 4}
"""The greeting; then a READY command: its head, its name, `Socket-Type` with DEALER or ROUTER, and an empty `Identity`."""


def test_counters_equal_the_bytes_that_pass(transports) -> None:
    """Every byte of every frame head, header and payload is counted, both ways; only the 124 or so of the handshake are not."""
    server = transports()
    proxy = Proxy(server.listen(ANY))
    client = transports()
    client.connect("server", proxy.address)
    peer = meet(client, server)
    for size in (0, 1, 200, 255, 256, 257, 65_535, 65_536, 1 << 20):
        client.send("server", HELLO, [bytes(size), b"tail"])
        server.send(peer, HELLO, [b"head", bytes(size)])
    server.send(peer, m.Refused("", "r" * 1000))  # a header of more than 255 bytes
    client.send("server", m.Ended())
    while server.received_bytes < client.sent_bytes:
        gather(server, 1)
    gather(client, 10)
    assert server.received_bytes == client.sent_bytes == proxy.passed["up"] - HANDSHAKE["up"]
    assert client.received_bytes == server.sent_bytes == proxy.passed["down"] - HANDSHAKE["down"]
    client.close()
    server.close()
    proxy.close()


def test_what_arrives_is_what_was_sent_in_order(transports) -> None:
    """Messages and payloads, from several clients, each under a name of its own; answers go back to who asked."""
    server = transports()
    address = server.listen(ANY)
    clients = [transports() for _ in range(3)]
    peers = []
    for client in clients:
        client.connect("server", address)
        peers.append(meet(client, server))
    assert len(set(peers)) == 3
    for client, number in itertools.product(clients, range(20)):
        client.send("server", m.Missing(0, number, [clients.index(client)]), [bytes([number]) * number * 5000])
    got = [arrival for arrival in gather(server, 60) if isinstance(arrival.message, m.Missing)]
    for index, peer in enumerate(peers):
        mine = [arrival for arrival in got if arrival.peer == peer]
        assert [arrival.message for arrival in mine] == [m.Missing(0, number, [index]) for number in range(20)]
        assert [bytes(arrival.payload[0]) for arrival in mine] == [bytes([number]) * number * 5000 for number in range(20)]
        server.send(peer, m.Hello(index, 0))
    for index, client in enumerate(clients):
        assert gather(client, 1)[0][:3] == ("server", m.Hello(index, 0), [])


def test_damaged_frames_arrive_as_an_error_of_their_sender(transports) -> None:
    """Also those of a stranger who does not know the protocol; the connection goes on."""
    server = transports()
    client = transports()
    client.connect("server", server.listen(ANY))
    peer = meet(client, server)
    client.send_frames("server", [b"GET / HTTP/1.1"])
    client.send("server", HELLO)
    broken, good = gather(server, 2)
    assert (broken.peer, broken.message, good.peer, good.message) == (peer, None, peer, HELLO)
    assert isinstance(broken.error, WireError)


def test_a_stranger_of_another_socket_type_does_no_harm(transports) -> None:
    """A REQ socket puts an empty frame in front: an error arrives, and members are still heard."""
    server = transports()
    address = server.listen(ANY)
    with zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(address)
        stranger.send(b"x")
        assert gather(server, 1)[0].error is not None
    client = transports()
    client.connect("server", address)
    meet(client, server)


@pytest.mark.parametrize("watched", [False, True])
def test_a_stranger_of_an_old_protocol_does_no_harm(transports, watched: bool) -> None:
    """Five bytes are a whole message of ZMTP 1.0, of which ZeroMQ knows no descriptor: an error arrives, members are heard."""
    server = transports()
    address = server.listen(ANY, watch=watched)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"\x01\x00\x02\x00A")
        assert gather(server, 1)[0].error is not None
    client = transports()
    client.connect("server", address)
    meet(client, server)


def test_a_listener_in_use_is_said_with_its_address(transports) -> None:
    """The second process on a port does not start, and its message says what to do."""
    address = transports().listen(ANY)
    with pytest.raises(ConfigError, match=rf"cannot listen at {address}: .*; stop the other process or choose another port"):
        transports().listen(address)


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "foo://127.0.0.1:1", "ipc://"])
def test_a_malformed_address_is_refused(transports, address: str) -> None:
    """To listen at and to connect to, with the address in the message."""
    transport = transports()
    for use in (transport.listen, lambda address: transport.connect("x", address)):
        with pytest.raises(ConfigError) as raised:
            use(address)
        assert address in str(raised.value)


def test_a_post_wakes_the_thread_that_polls(transports) -> None:
    """A poll of minutes returns at once, with everything posted, in order."""
    transport = transports()
    posting = threading.Thread(target=lambda: [transport.post(number) for number in range(100)])
    began = time.monotonic()
    posting.start()
    posted: list[object] = []
    while len(posted) < 100:
        posted += [arrival.posted for arrival in transport.poll(PATIENCE * 6)]
    posting.join()
    assert posted == list(range(100))
    assert time.monotonic() - began < PATIENCE


def test_a_post_that_wakes_nobody_comes_with_the_next_wake(transports) -> None:
    """So several cost one. A thread that polls already is not disturbed before."""
    transport = transports()
    assert transport.poll(0.0) == []

    def post() -> None:
        for number in range(3):
            transport.post(number, wake=False)
        transport.wake()

    posting = threading.Thread(target=post)
    posting.start()
    posted: list[object] = []
    while len(posted) < 3:
        posted += [arrival.posted for arrival in transport.poll(PATIENCE * 6)]
    posting.join()
    assert posted == [0, 1, 2]


def test_what_was_posted_before_the_poll_is_not_waited_for(transports) -> None:
    """Nor does an idle poll take longer than it was told, or less."""
    transport = transports()
    transport.post("x")
    began = time.monotonic()
    assert [arrival.posted for arrival in transport.poll(60.0)] == ["x"]
    assert transport.poll(0.05) == []
    assert 0.05 <= time.monotonic() - began < PATIENCE


def test_what_is_sent_to_nobody_is_dropped(transports) -> None:
    """A peer that never was, one that has gone, an unknown link, and one that nobody answers: no error, and no bytes counted."""
    server = transports()
    client = transports()
    client.connect("server", server.listen(ANY))
    peer = meet(client, server)
    client.close()
    before = server.sent_bytes
    deadline = time.monotonic() + PATIENCE
    while True:  # until the server's kernel has seen the client go, sends may still count
        server.send(peer, HELLO)
        if server.sent_bytes == before:
            break
        before = server.sent_bytes
        assert time.monotonic() < deadline
        server.poll(0.01)
    server.send(b"nobody", HELLO, [bytes(1 << 17)])
    server.send("no such link", HELLO)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, but never shakes hands
        server.connect("silent", f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        server.send("silent", HELLO)
        server.disconnect("silent")
    assert server.sent_bytes == before


def test_a_link_comes_up_when_the_other_side_does(transports) -> None:
    """Start order does not matter: who connects first is heard once somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    client = transports()
    client.connect("server", address)
    client.send("server", HELLO)
    assert client.sent_bytes == 0
    server = transports()
    server.listen(address)
    meet(client, server)


def test_a_link_opened_again_takes_the_place_of_the_old_one(transports) -> None:
    """The old socket is closed: closing the transport would otherwise wait for it without end."""
    first, second, client = transports(), transports(), transports()
    client.connect("server", first.listen(ANY))
    meet(client, first)
    client.connect("server", second.listen(ANY))
    meet(client, second)
    assert first.poll(0.05) == []
    client.disconnect("server")
    client.disconnect("server")
    closing = threading.Thread(target=client.close)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_last_words_arrive(transports) -> None:
    """What was sent before `close` is delivered, though the sender is gone at once."""
    server = transports()
    client = transports()
    client.connect("server", server.listen(ANY))
    meet(client, server)
    client.send("server", m.Ended(), [bytes(1 << 20)])
    client.close()
    arrival = gather(server, 1)[-1]
    assert arrival.message == m.Ended()
    assert len(memoryview(arrival.payload[0])) == 1 << 20


def test_close_is_bounded_twice_harmless_and_final(transports) -> None:
    """With words for somebody who does not read them, and with threads that still post."""
    server = transports()
    client = transports()
    client.connect("server", server.listen(ANY))
    meet(client, server)
    for _ in range(64):
        client.send("server", HELLO, [bytes(1 << 20)])
    began = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - began < PATIENCE
    client.post("too late")
    client.send("server", HELLO)


def test_posts_during_close_harm_nobody(transports) -> None:
    """Threads that post while the transport closes neither fail nor write to a descriptor that is somebody else's by then."""
    for _ in range(20):
        transport = transports()
        started = threading.Event()

        def post(transport=transport, started=started) -> None:
            for number in range(2000):
                transport.post(number)
                started.set()

        thread = threading.Thread(target=post)
        thread.start()
        started.wait()
        transport.close()
        left, right = socket.socketpair()  # takes the number that the transport has just given back
        thread.join()
        right.setblocking(False)
        with pytest.raises(BlockingIOError):
            right.recv(8)
        left.close()
        right.close()


def test_the_outgoing_hook_decides_what_is_sent(transports) -> None:
    """It may drop, double, delay, change and redirect whole messages; what it returns is what is counted."""
    seen: list[object] = []

    def twice_or_never(peer, frames):
        message = framing.unpack(frames)[0]
        seen.append((peer, message))
        return [] if isinstance(message, m.Ended) else [(peer, frames), (peer, framing.pack(m.Pulse()))]

    server = transports()
    client = transports(outgoing=twice_or_never)
    client.connect("server", server.listen(ANY))
    deadline = time.monotonic() + PATIENCE
    while not client.sent_bytes and time.monotonic() < deadline:
        client.send("server", HELLO)
        client.poll(0.01)
    client.send("server", m.Ended())
    client.send("server", m.Hello(9, 9))
    got = [arrival.message for arrival in gather(server, 4)][-4:]
    assert got == [HELLO, m.Pulse(), m.Hello(9, 9), m.Pulse()]
    assert seen[-2:] == [("server", m.Ended()), ("server", m.Hello(9, 9))]
    assert server.received_bytes == client.sent_bytes


def test_what_is_sent_soon_goes_as_one_message(transports) -> None:
    """With the next poll, to each peer its own; there they are single messages again, with their payloads, in order."""
    sent: list[int] = []

    def counting(peer, frames):
        sent.append(len(frames))
        return [(peer, frames)]

    server = transports()
    client = transports(outgoing=counting)
    client.connect("server", server.listen(ANY))
    meet(client, server)
    sent.clear()
    for number in range(5):
        client.send_soon("server", m.Hello(number, 0), [bytes([number]) * 100 * number])
        client.send_soon("no such link", m.Ended())
    assert server.poll(0.02) == []
    assert client.poll(0.0) == []
    got = [arrival for arrival in gather(server, 5) if arrival.message != HELLO]
    assert [(arrival.message, bytes(arrival.payload[0])) for arrival in got] == [
        (m.Hello(number, 0), bytes([number]) * 100 * number) for number in range(5)
    ]
    assert sent == [2, 1]
    assert client.poll(0.0) == []
    assert sent == [2, 1]
    assert server.received_bytes <= client.sent_bytes


def test_ipc_sockets_work(transports, tmp_path) -> None:
    """For runs on one machine that other users must not reach."""
    server, client = transports(), transports()
    client.connect("server", server.listen(f"ipc://{tmp_path}/s"))
    peer = meet(client, server)
    server.send(peer, HELLO)
    assert gather(client, 1)[0].message == HELLO


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc://{}/socket"])
def test_a_broken_connection_is_told(address: str, tmp_path: Path) -> None:
    """Of a peer that has said something, and of no other; what it said before comes first."""
    here, there, other = Transport(), Transport(), Transport()
    try:
        resolved = here.listen(address.format(tmp_path), watch=True)
        for link in (there, other):
            link.connect("here", resolved)
        peers = {}
        while len(peers) < 2:
            for slot, link in enumerate((there, other)):
                if slot not in peers:
                    link.send("here", m.Hello(slot, 1))
            for arrival in here.poll(0.05):
                assert not arrival.lost
                peers[arrival.message.slot] = arrival.peer
        there.close()
        lost = next(arrivals for _ in range(100) if (arrivals := here.poll(0.1)))
        assert [(arrival.peer, arrival.lost) for arrival in lost] == [(peers[0], True)]
    finally:
        for link in (here, there, other):
            link.close()


def test_a_link_knows_whether_it_has_a_connection(tmp_path: Path) -> None:
    """Without asking: not before somebody listens, nor when who listened is gone; again when there is another."""
    address, link = f"ipc://{tmp_path}/socket", Transport()

    def waited_for(linked: bool) -> bool:
        return any(link.poll(0.02) or link.linked("there") is linked for _ in range(500))

    try:
        assert not link.linked("there")
        link.connect("there", address)
        assert not link.linked("there")
        for _ in range(2):
            there = Transport()
            there.listen(address)
            assert waited_for(True)
            there.close()
            assert waited_for(False)
    finally:
        link.close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc://{}/socket"])
def test_a_link_remembers_that_its_connection_broke(address: str, tmp_path: Path) -> None:
    """Also when it has another by the time that somebody asks: what went to the first one may be lost. Once a break."""
    link, there = Transport(), Transport()
    try:
        assert not link.broke("there")
        resolved = there.listen(address.format(tmp_path))
        link.connect("there", resolved)
        assert not link.broke("there")
        for _ in range(2):
            meet_again(link, there)
            assert not link.broke("there")
            there.close()
            assert any(link.poll(0.02) or not link.linked("there") for _ in range(500))
            there = Transport()
            there.listen(resolved)
            meet_again(link, there)
            assert [link.broke("there") for _ in range(2)] == [True, False]
        link.disconnect("there")
        assert not link.broke("there")
    finally:
        link.close()
        there.close()


def meet_again(link: Transport, there: Transport) -> None:
    """Wait until what a link says arrives."""
    for _ in range(500):
        link.send("there", HELLO)
        link.poll(0)
        if there.poll(0.02):
            return
    raise AssertionError("nothing has arrived")
