"""How much a TCP connection takes in before it says that it has: a window as small as its link allows, so that all share alike.

Connections that share a link fill a queue before it. Who has more in the queue has more of the link, and the system lets windows
grow to megabytes: then losses decide who sends, which is nothing like even for seconds, and a key is answered when the slowest
push of it is there. With equal windows whose sum the queue holds nothing is lost, and each has an equal part
(docs/decisions/0033-windows-that-fit-the-link.md).

    window = max(64 KiB, rate * round trip),  rate = 2.5 Gbit/s

The round trip is the least that the connection has seen in the last minutes. Where that comes to more than any system grants,
over long distances, the system chooses as before, or again: a window smaller than the link holds would idle it.
Not between two ends of one address, or of the loopback network: those share no link.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket as sockets
import struct

__all__ = ["LEAST", "MOST", "RATE", "fit", "window"]

LEAST = 1 << 16
"""Bytes that any connection may have under way: what TCP knew before windows were scaled, and some 45 packets."""
MOST = 208 << 10
"""Bytes that a process may ask for where `net.core.rmem_max` is what Linux sets."""
RATE = 2.5e9 / 8
"""Bytes a second that one connection may carry where its receiver keeps up. Several to each host carry more, and slower links
need less."""
_LEAST_ROUND_TRIP = 148
"""Where `struct tcp_info` has `tcpi_min_rtt`, a uint32, in microseconds; it is what the kernel shows programs, and only grows."""
_BUF_LOCK, _RECEIVE_LOCKED = 72, 2
"""`SO_BUF_LOCK` of Linux 5.15, which Python does not name, and the bit of a receive buffer whose size the system leaves alone."""


def window(round_trip: float) -> int | None:
    """Return the window of a connection in bytes; None where the system should choose it.

    Args:
        round_trip: The least time that an answer took, in seconds.
    """
    needed = max(LEAST, round(RATE * round_trip))
    return needed if needed <= MOST else None


def fit(descriptor: int, port: int) -> int | None:
    """Give a connection its window, if it goes to another address; or leave that to the system again.

    Args:
        descriptor: Of the connection's socket; somebody else's, who may close it at any time.
        port: Which one of the connection's ends has, if it is still that connection's descriptor.

    Returns:
        The window that it has been given; None if it was left alone.
    """
    with contextlib.suppress(OSError), _opened(descriptor) as connection:
        if connection.family not in (sockets.AF_INET, sockets.AF_INET6) or connection.type != sockets.SOCK_STREAM:
            return None
        here, there = connection.getsockname(), connection.getpeername()
        if port not in (here[1], there[1]) or here[0] == there[0] or ipaddress.ip_address(there[0].partition("%")[0]).is_loopback:
            return None
        said = connection.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _LEAST_ROUND_TRIP + 4)
        if len(said) < _LEAST_ROUND_TRIP + 4:
            return None
        chosen = window(1e-6 * struct.unpack_from("=I", said, _LEAST_ROUND_TRIP)[0])
        if chosen is not None:
            connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, chosen)  # the system takes twice that, for what it keeps
        elif (locked := connection.getsockopt(sockets.SOL_SOCKET, _BUF_LOCK)) & _RECEIVE_LOCKED:
            connection.setsockopt(sockets.SOL_SOCKET, _BUF_LOCK, locked & ~_RECEIVE_LOCKED)
        return chosen
    return None


def _opened(descriptor: int) -> sockets.socket:
    """Return a socket of a descriptor of its own, for the same connection.

    Raises:
        OSError: It is none, or none of ZeroMQ, whose never block. (One that does might be told not to, here.)
    """
    own = os.dup(descriptor)
    try:
        if os.get_blocking(own):
            raise BlockingIOError(f"descriptor {descriptor} blocks")
        return sockets.socket(fileno=own)
    except OSError:
        os.close(own)
        raise
