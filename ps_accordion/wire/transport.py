"""The sockets of one process: the only file that knows ZeroMQ.

One thread owns a `Transport` and everything in it. Others may only `post` to it, which wakes that thread.

Choices, each with its reason (measured, or the way ZeroMQ fails):

* one listening ROUTER, a connecting DEALER for each peer: a poll costs 63 us with 64 sockets and 5 us with 2;
* a message to a listener's peer that is gone is dropped, as on a lost link: the protocol asks again for what it needs;
* `IMMEDIATE`: nothing is queued for a peer that is not there, else stale copies pile up and arrive later;
* no send limit: what may be in flight is bounded by the protocol (one push and one result a key; for a shard without its state
  what it has asked for, which is repeated less and less often), and results share memory;
* frames of 64 KiB and more are sent without a copy: their memory must not change until the round is answered;
* `LINGER` is bounded: 0 would lose the last words of a process, -1 would hang its exit.
"""

from __future__ import annotations

import collections
import errno
import os
import select
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from typing_extensions import Buffer
from zmq.utils.monitor import recv_monitor_message

from ..errors import ConfigError, WireError
from . import framing, windows
from .actions import Peer
from .addresses import is_alive, port_of
from .bundle import Part, bundled, parts_of
from .lane import Loan
from .lending import Lending
from .messages import Lent, Message

__all__ = ["Arrival", "Transport"]

Outgoing = Callable[[Peer, list[Buffer]], Iterable[tuple[Peer, list[Buffer]]]]

RECEIVE_LIMIT = 128
"""Messages held for this process by its ZeroMQ thread, a peer: further ones wait in the sender's kernel."""
HANDSHAKE_MS = 2000
LINGER_MS = 500
RECONNECT_MS, RECONNECT_MAX_MS = 50, 400
"""Between attempts to reach who is not there. A server that was killed is back within a second or two."""
CONNECT_MS = 3000
"""An attempt is given up and made anew after so long. The system's own pauses double: over a link that was cut for a minute, it
would try again half a minute after the link is whole."""
UNANSWERED_MS = 20_000
"""A connection is broken when its other end has taken nothing in for so long, where something is to be sent. The system alone
would try for a quarter of an hour."""
ZERO_COPY = 1 << 16
"""Bytes from which a frame is sent without a copy: telling its owner that it has been sent takes as long as copying less."""
LOOK_AGAIN = 32
"""Messages from one connection until its window is looked at again: a link that was made anew may have the same descriptor."""
ZMTP_SHORT, ZMTP_LONG = 2, 9
"""Bytes that ZMTP puts before a frame, of up to 255 bytes and of more."""

_NOW, _NOW_AND_MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
"""As integers: pyzmq's flags are an enumeration, which is slow to combine."""


class Arrival(NamedTuple):
    """What `poll` returns: a message with its payload frames, a fault in what came, something posted by a thread, or a loss."""

    peer: Peer
    message: Message | None
    payload: Sequence[Buffer]
    error: WireError | None
    posted: Any
    lost: bool = False
    """Whether the connection of `peer` has broken. It says nothing further; a process that lives comes back as another peer."""
    loan: Loan | None = None
    """Of payload frames that lie in the sender's lane: whoever uses them verifies them first. None for frames that came."""


class Transport:
    """Sockets of one process, owned by one thread.

    Args:
        outgoing: Stands between the process and its sockets: called with every (peer, frames), it returns what is sent
            instead. Tests lose, double and reorder messages here; None sends all as it is.
    """

    def __init__(self, *, outgoing: Outgoing | None = None) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        """Of what went through sockets; `lending` counts the rest."""
        self.lending = Lending()
        """Off, unless a role puts another in its place before it connects or listens. Closed with the sockets."""
        self._outgoing = outgoing
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._listener: zmq.Socket[bytes] | None = None
        self._links: dict[str, zmq.Socket[bytes]] = {}
        self._names: dict[Any, str] = {}
        self._ports: dict[Any, int] = {}
        """Of the listener and of links; of those that are TCP."""
        self._looked: dict[int, tuple[Peer, int]] = {}
        """By descriptors of connections, whose they were last, and how many messages since the window was looked at."""
        self._watched: dict[str, zmq.Socket[bytes]] = {}
        """Tell, by the names of links, when their connections break."""
        self._monitor: zmq.Socket[bytes] | None = None
        self._by_descriptor: dict[int, bytes] = {}
        self._peers: set[bytes] = set()
        self._soon: dict[Peer, list[Part]] = {}
        self._posted: collections.deque[Any] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake, select.POLLIN)
        self._path = ""
        self._rung = False
        self._closed = False
        self._closing = threading.Lock()

    def listen(self, address: str, *, watch: bool = False) -> str:
        """Listen at `address` and return it with the port that the system chose.

        Args:
            address: Where.
            watch: Whether `poll` is to tell when the connection of a peer that has said something breaks.

        Raises:
            ConfigError: The address is malformed or in use.
        """
        if is_alive(address):
            raise ConfigError(f"cannot listen at {address}: another process does; stop it or choose another path")
        socket = self._socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close(0)
            hint = "stop the other process or choose another port" if error.errno == errno.EADDRINUSE else "correct the address"
            raise ConfigError(f"cannot listen at {address}: {error.strerror}; {hint}") from None
        self._listener = socket
        self._poller.register(socket, zmq.POLLIN)
        if watch:
            self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._poller.register(self._monitor, zmq.POLLIN)
        resolved = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._path = resolved.removeprefix("ipc://") if resolved.startswith("ipc://") else ""
        self._ports[socket] = port_of(resolved)
        return resolved

    def connect(self, name: str, address: str) -> None:
        """Open a link called `name` to whoever listens at `address`, in place of one of that name.

        It is kept up until `disconnect`.

        Raises:
            ConfigError: The address is malformed.
        """
        socket = self._socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.TCP_MAXRT, UNANSWERED_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise ConfigError(f"cannot use {address!r} as an address: {error.strerror}") from None
        self.disconnect(name)
        self._links[name], self._watched[name] = socket, socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._names[socket] = name
        self._ports[socket] = port_of(address)
        self._poller.register(socket, zmq.POLLIN)

    def disconnect(self, name: str) -> None:
        """Close the link called `name`, if there is one."""
        socket = self._links.pop(name, None)
        if socket is not None:
            self._poller.unregister(socket)
            del self._names[socket], self._ports[socket]
            socket.disable_monitor()
            self._watched.pop(name).close(0)
            socket.close(0)

    def linked(self, name: str) -> bool:
        """Whether the link called `name` has a connection at this moment. It asks nobody."""
        socket = self._links.get(name)
        return socket is not None and bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)

    def broke(self, name: str) -> bool:
        """Whether the connection of the link called `name` has broken since this was last asked, also if there is a new one."""
        watched, found = self._watched.get(name), False
        while watched is not None and int(watched.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            recv_monitor_message(watched)
            found = True
        return found

    def send(self, peer: Peer, message: Message, payload: Sequence[Buffer] = ()) -> None:
        """Send a message. It may be lost; the protocol notices."""
        self.send_frames(peer, framing.pack(*self._lent(peer, (message, payload))))

    def send_soon(self, peer: Peer, message: Message, payload: Sequence[Buffer] = ()) -> None:
        """Send a message before the next `poll` waits, bundled with what else goes to that peer until then."""
        self._soon.setdefault(peer, []).append(self._lent(peer, (message, payload)))

    def _lent(self, peer: Peer, part: Part) -> Part:
        return self.lending.lent(part) if self.lending.reads(peer) else part

    def send_frames(self, peer: Peer, frames: list[Buffer]) -> None:
        """Send frames that `framing.pack` or `bundled` made."""
        if self._outgoing is None:
            self._send(peer, frames)
        else:
            for other, changed in self._outgoing(peer, frames):
                self._send(other, changed)

    def _send(self, peer: Peer, frames: list[Buffer]) -> None:
        if isinstance(peer, bytes):
            socket, parts = self._listener, [peer, *frames]
        else:
            socket, parts = self._links.get(peer), frames
        if socket is None:
            return
        try:
            # Not `send_multipart`, which looks at every frame again: a message is small, and there are hundreds in a round.
            for position, part in enumerate(parts, 1):
                small = memoryview(part).nbytes < ZERO_COPY
                socket.send(part, _NOW if position == len(parts) else _NOW_AND_MORE, copy=small)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return  # nobody there: lost, as on a link
        self.sent_bytes += sum(map(_on_wire, frames))

    def post(self, item: Any, *, wake: bool = True) -> None:
        """Hand `item` to the thread that polls. Any thread may call this; what is posted after `close` is dropped.

        Args:
            item: What `poll` is to return.
            wake: Whether that thread is to look at once. If not, it does when it wakes for another reason: call `wake` soon.
        """
        self._posted.append(item)
        if wake:
            self.wake()

    def wake(self) -> None:
        """Have the thread that polls look at what was posted. Any thread may call this."""
        # Ringing costs a system call; once is enough until the other side has looked. It clears the mark before it takes what is
        # posted, so an item that finds the mark set is seen. The lock keeps `close` from handing the descriptor to somebody else.
        if self._rung:
            return
        with self._closing:
            if not self._closed:
                self._rung = True
                os.eventfd_write(self._wake, 1)

    def poll(self, timeout: float) -> list[Arrival]:
        """Wait up to `timeout` seconds and return what has come, in order of arrival for each peer."""
        soon, self._soon = self._soon, {}
        for peer, parts in soon.items():
            for frames in bundled(parts):
                self.send_frames(peer, frames)
        arrivals: list[Arrival] = []
        if self._posted:
            timeout = 0.0
        for socket, _ in self._poller.poll(max(0, round(timeout * 1000 + 0.4999))):
            if socket == self._wake:
                os.eventfd_read(self._wake)
                self._rung = False
            elif socket is self._monitor:
                self._notice(arrivals)
            else:
                self._receive(socket, arrivals)
        while self._posted:
            arrivals.append(Arrival("", None, [], None, self._posted.popleft()))
        return arrivals

    def _receive(self, socket: Any, arrivals: list[Arrival]) -> None:
        port = self._ports[socket]
        for _ in range(RECEIVE_LIMIT):
            try:
                frames = [socket.recv(_NOW, copy=False)]
            except zmq.Again:
                return
            while frames[-1].more:  # `recv_multipart` asks the socket instead, which takes ten times as long
                frames.append(socket.recv(0, copy=False))
            peer: Peer
            if socket is not self._listener:
                peer = self._names[socket]
            else:
                peer = bytes(frames.pop(0))
                if self._monitor is not None and peer not in self._peers and (descriptor := _descriptor(frames)) >= 0:
                    self._peers.add(peer)
                    self._by_descriptor[descriptor] = peer
            if port and (descriptor := _descriptor(frames)) >= 0:
                self._look_at(descriptor, peer, port)
            buffers: list[Buffer] = [frame.buffer for frame in frames]
            self.received_bytes += sum(map(_on_wire, buffers))
            try:
                parts = parts_of(*framing.unpack(buffers))
            except WireError as error:
                arrivals.append(Arrival(peer, None, [], error, None))
            else:
                for message, payload in parts:
                    if isinstance(message, Lent):
                        self._borrow(peer, message, payload, arrivals)
                    else:
                        arrivals.append(Arrival(peer, message, payload, None, None))

    def _look_at(self, descriptor: int, peer: Peer, port: int) -> None:
        who, messages = self._looked.get(descriptor, (None, 0))
        if who != peer or messages >= LOOK_AGAIN:
            messages = 0
            windows.fit(descriptor, port)
        self._looked[descriptor] = peer, messages + 1

    def _borrow(self, peer: Peer, lent: Lent, behind: Sequence[Buffer], arrivals: list[Arrival]) -> None:
        if not self.lending.is_known(peer, lent):
            self.send(peer, self.lending.said(peer))  # lost, and the sender learns why
            return
        try:
            borrowed = self.lending.borrowed(peer, lent, behind)
        except WireError as error:
            arrivals.append(Arrival(peer, None, [], error, None))
            return
        if borrowed is not None:  # else it has come too late, and is as good as lost
            (message, payload), loan = borrowed
            arrivals.append(Arrival(peer, message, payload, None, None, loan=loan))

    def _notice(self, arrivals: list[Arrival]) -> None:
        assert self._monitor is not None
        while self._monitor.poll(0):
            peer = self._by_descriptor.pop(recv_monitor_message(self._monitor)["value"], None)
            if peer is not None:
                self._peers.discard(peer)
                arrivals.append(Arrival(peer, None, [], None, None, lost=True))

    def close(self) -> None:
        """Send what is queued, for a bounded time, and close everything. Closing twice is harmless."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        if self._monitor is not None and self._listener is not None:
            self._poller.unregister(self._monitor)
            self._listener.disable_monitor()
            self._monitor.close(0)
            self._monitor = None
        for name, watched in self._watched.items():
            self._links[name].disable_monitor()
            watched.close(0)
        for socket in [*self._links.values(), *([self._listener] if self._listener is not None else [])]:
            socket.close(LINGER_MS)
        self._watched.clear()
        self._links.clear()
        self._listener = None
        self._ports.clear()
        self._context.term()
        self.lending.close()
        os.close(self._wake)
        if self._path:
            Path(self._path).unlink(missing_ok=True)  # ZeroMQ leaves the file

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_LIMIT)
        socket.setsockopt(zmq.MAXMSGSIZE, framing.MAX_FRAME)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        return socket


def _descriptor(frames: Sequence[zmq.Frame]) -> int:
    """Return by which descriptor a message came; -1 if ZeroMQ does not know, as of strangers that speak an old protocol."""
    try:
        return int(frames[0].get(zmq.SRCFD)) if frames else -1
    except zmq.ZMQError:
        return -1


def _on_wire(frame: Buffer) -> int:
    size = memoryview(frame).nbytes
    return size + (ZMTP_SHORT if size < 256 else ZMTP_LONG)
