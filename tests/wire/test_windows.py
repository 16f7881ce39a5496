"""Windows of connections: which ones are given one, and how large it is."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_accordion.wire import windows


@given(st.floats(0, 10))
def test_a_window_is_never_less_than_its_link_may_hold(round_trip: float) -> None:
    """At least 64 KiB, and what 2.5 Gbit/s bring in a round trip; where that is more than systems grant, theirs."""
    chosen = windows.window(round_trip)
    if chosen is None:
        assert round(windows.RATE * round_trip) > windows.MOST
    else:
        assert chosen >= 65_536
        assert chosen + 1 >= windows.RATE * round_trip


@pytest.mark.parametrize(
    ("round_trip", "expected"), [(0.0, 65_536), (50e-6, 65_536), (400e-6, 125_000), (1e-3, None), (0.04, None)]
)
def test_windows_of_some_links(round_trip: float, expected: int | None) -> None:
    """A switch; another room; another building; another continent."""
    assert windows.window(round_trip) == expected


def test_connections_that_share_no_link_are_left_alone() -> None:
    """Within this machine, of another family, of none, and under a number that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        port, before = server.getsockname()[1], client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        client.setblocking(False)
        assert windows.fit(client.fileno(), port) is None
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before
        assert windows.fit(server.fileno(), port) is None  # it listens, and has no other end
    one, other = socket.socketpair()
    with one, other:
        assert windows.fit(one.fileno(), port) is None
    with Path(__file__).open(encoding="utf-8") as file:
        assert windows.fit(file.fileno(), port) is None
    assert windows.fit(1 << 20, port) is None


ELSEWHERE = """
import ctypes, fcntl, json, os, socket, struct, sys
from ps_accordion.wire import messages as m, windows
from ps_accordion.wire.transport import Transport

NEW_USER, NEW_NET, SET_ADDRESS, SET_FLAGS, UP = 0x10000000, 0x40000000, 0x8916, 0x8914, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(NEW_NET) and libc.unshare(NEW_USER | NEW_NET):
    print(json.dumps({"not run": os.strerror(ctypes.get_errno())}))
    sys.exit()
with socket.socket() as control:
    for name, address in (("lo", "127.0.0.1"), ("lo:1", "10.9.8.1"), ("lo:2", "10.9.8.2")):
        where = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(control, SET_ADDRESS, struct.pack("16s", name.encode()) + where)
    fcntl.ioctl(control, SET_FLAGS, struct.pack("16sH14x", b"lo", UP))

def buffers(port):
    found = {}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                here, there = connection.getsockname()[1], connection.getpeername()[1]
                if port in (here, there):
                    found["server" if here == port else "client"] = connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        except (OSError, IndexError):
            pass
    return found

server, client = Transport(), Transport()
address = server.listen("tcp://10.9.8.2:*")
port = int(address.rpartition(":")[2])
client.connect("server", address.replace("tcp://", "tcp://10.9.8.1:0;"))

def arrives(at, peer, sender):
    while True:
        sender.send(peer, m.Ask(0, 0, 0, 1, [0]))
        for arrival in at.poll(0.05):
            return arrival.peer

peer = arrives(server, "server", client)
arrives(client, peer, server)
before = buffers(port)
stranger = socket.create_connection(("10.9.8.2", port), source_address=("10.9.8.1", 0))
blocking = windows.fit(stranger.fileno(), port)
stranger.setblocking(False)
wrong = windows.fit(stranger.fileno(), port + 1)
right = windows.fit(stranger.fileno(), port)
windows.MOST = 0
far, lock = windows.fit(stranger.fileno(), port), stranger.getsockopt(socket.SOL_SOCKET, 72)
print(json.dumps({"before": before, "left alone": [blocking, wrong], "right": right, "far": far, "lock": lock}))
stranger.close(), client.close(), server.close()
"""


def test_connections_between_machines_have_a_window_from_their_first_message_on() -> None:
    """Both ends, on real sockets between two addresses in a network of their own.

    One that is not ours is left alone; one whose round trip is long gives its window back.
    """
    done = subprocess.run([sys.executable, "-P", "-c", ELSEWHERE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if "not run" in said:
        pytest.skip(f"not run: this process may not make a network of its own: {said['not run']}")
    both = {"server": 2 * windows.LEAST, "client": 2 * windows.LEAST}
    assert said == {"before": both, "left alone": [None, None], "right": windows.LEAST, "far": None, "lock": 0}
