"""Starts what the first send without a copy starts in a process: pyzmq's thread that frees sent memory, and its sockets.

They stay until the process ends, so they must be there before anybody looks for leftovers: at import.
"""

import zmq

LARGE = 1 << 20


def _send_once() -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://zero-copy")
        other.connect("inproc://zero-copy")
        one.send(bytes(LARGE), copy=False)
        other.recv()


_send_once()
