"""A switch that hands on every packet after a fixed time, where the kernel has no `netem`: one TUN device a host, one process.

    python -m benchmarks.delay MILLISECONDS NAMESPACE=ADDRESS...

Prints `ready` once all devices are there. Carries some 200 to 300 Mbit/s; ends with SIGTERM.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path

__all__ = ["INTERFACE", "MTU"]

INTERFACE = "net0"
MTU = 9000
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000


def main() -> None:
    """Forward packets until the process is ended."""
    delay = float(sys.argv[1]) / 1000
    device_of: dict[bytes, int] = {}
    for pair in sys.argv[2:]:
        namespace, _, address = pair.partition("=")
        device_of[socket.inet_aton(address)] = _device(namespace)
    print("ready", flush=True)
    waiting: list[tuple[float, int, bytes, int]] = []
    ready, number = select.poll(), 0
    for device in device_of.values():
        ready.register(device, select.POLLIN)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, packet, device = heapq.heappop(waiting)
            os.write(device, packet)
        pause = max(0.0, 1000 * (waiting[0][0] - time.monotonic())) if waiting else None
        for device, _ in ready.poll(pause):
            try:
                while True:
                    packet = os.read(device, MTU + 64)
                    target = device_of.get(packet[16:20]) if packet[0] >> 4 == 4 else None  # IPv4: where the destination stands
                    if target is not None:
                        number += 1  # packets of one time keep their order
                        heapq.heappush(waiting, (time.monotonic() + delay, number, packet, target))
            except BlockingIOError:
                pass


def _device(namespace: str) -> int:
    """Make a TUN device in a network namespace, and return its descriptor; this process is in that namespace afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter {namespace}: {os.strerror(error)}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN | IFF_NO_PI))
    return device


if __name__ == "__main__":
    main()
