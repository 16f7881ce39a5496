"""Hosts on one machine: network namespaces around a switch, each with a link that is really limited in both directions.

Needs root, `ip` and `tc` (Debian: iproute2). Addresses exist only inside the namespaces, which go away at the end, also after an
error; what a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

from benchmarks import delay
from benchmarks.delay import INTERFACE

__all__ = ["INTERFACE", "Host", "Unavailable", "bits_of", "carried", "hosts", "mend", "sever", "throughput"]

PREFIX = "psa-bench"
NOBODY = "02:00:00:00:00:01"
"""An address of no interface: a bridge hands on what is sent to it, and all drop it."""
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class Unavailable(Exception):
    """This machine, or this user, cannot make hosts; says why and what to do."""


class Host(NamedTuple):
    """One host.

    Attributes:
        namespace: Its network namespace.
        address: Its IPv4 address.
    """

    namespace: str
    address: str

    def runs(self, *command: str) -> list[str]:
        """Return a command that runs on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]


def bits_of(rate: str) -> float:
    """Return bits a second of a rate as tc writes it, such as `100mbit`.

    Raises:
        ValueError: It is not one.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not found:
        raise ValueError(f"expected a rate such as 100mbit or 1gbit, got {rate!r}")
    return float(found[1]) * UNITS[found[2]]


@contextlib.contextmanager
def hosts(count: int, rate: str, delay_ms: float = 0) -> Iterator[list[Host]]:
    """Make hosts, each with a link of `rate` to a switch, one limit a direction; take them down at the end.

    Args:
        count: How many.
        rate: As tc writes it.
        delay_ms: How long the switch keeps a packet, so that a round trip takes twice as long. With a delay only what a host
            sends is limited.

    Raises:
        Unavailable: Not root, no `ip` or `tc`, or the kernel has no namespaces or no `tbf`.
    """
    if os.geteuid() != 0:
        raise Unavailable("limited links need network namespaces, which need root: run it as root")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"there is no {' and no '.join(missing)}; on Debian and Ubuntu: apt-get install iproute2")
    _remove_left_behind()
    mark = f"{PREFIX}-{os.getpid()}"
    hub, made = f"{mark}-hub", [Host(f"{mark}-{number}", f"10.77.0.{1 + number}") for number in range(count)]
    names = [hub, *(host.namespace for host in made)]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        if delay_ms:
            with _delayed(made, rate, delay_ms):
                yield made
        else:
            _ip("-n", hub, "link", "add", "switch", "type", "bridge")
            _ip("-n", hub, "link", "set", "switch", "up")
            for number, host in enumerate(made):
                _connect(hub, f"port{number}", host, rate)
            yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def carried(host: Host) -> tuple[int, int]:
    """Return the bytes that a host has received and sent so far, headers of the network included."""
    text = subprocess.run(host.runs("cat", "/proc/net/dev"), capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == INTERFACE:
            fields = figures.split()
            return int(fields[0]), int(fields[8])
    raise Unavailable(f"{host.namespace} has no interface {INTERFACE}")


def sever(one: Host, other: Host) -> None:
    """Have whatever two hosts send each other vanish, from now on: nothing tells either of them."""
    for here, there in ((one, other), (other, one)):
        _ip("-n", here.namespace, "neigh", "replace", there.address, "lladdr", NOBODY, "dev", INTERFACE, "nud", "permanent")


def mend(one: Host, other: Host) -> None:
    """Undo `sever`."""
    for here, there in ((one, other), (other, one)):
        _ip("-n", here.namespace, "neigh", "delete", there.address, "dev", INTERFACE)


def throughput(sender: Host, receiver: Host, connections: int = 1, seconds: float = 2.0) -> float:
    """Return what TCP connections together carry between two hosts, in bits a second of payload."""
    program, number = [sys.executable, "-m", "benchmarks.hosts"], str(connections)
    receiving = receiver.runs(*program, "receive", receiver.address, number)
    with subprocess.Popen(receiving, stdout=subprocess.PIPE, text=True) as listening:
        assert listening.stdout is not None
        try:
            port = listening.stdout.readline().strip()
            subprocess.run(sender.runs(*program, "send", receiver.address, port, number, str(seconds)), check=True)
            return float(listening.communicate()[0])
        except BaseException:
            listening.kill()
            raise


def _connect(hub: str, port: str, host: Host, rate: str) -> None:
    _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
    _ip("-n", hub, "link", "set", port, "master", "switch", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
    _limit(hub, port, rate)
    _limit(host.namespace, INTERFACE, rate)


@contextlib.contextmanager
def _delayed(made: list[Host], rate: str, delay_ms: float) -> Iterator[None]:
    pairs = [f"{host.namespace}={host.address}" for host in made]
    forwarder = subprocess.Popen([sys.executable, "-m", "benchmarks.delay", str(delay_ms), *pairs], stdout=subprocess.PIPE)
    assert forwarder.stdout is not None
    try:
        if forwarder.stdout.readline() != b"ready\n":
            raise Unavailable("the switch with a delay has not started; is there a /dev/net/tun?")
        for host in made:
            _ip("-n", host.namespace, "link", "set", INTERFACE, "mtu", str(delay.MTU), "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _limit(host.namespace, INTERFACE, rate)
        yield
    finally:
        forwarder.terminate()
        forwarder.wait()
        forwarder.stdout.close()


def _limit(namespace: str, interface: str, rate: str) -> None:
    # A bucket of 2 ms and at least 64 KiB: the kernel's timer fills it that often; a larger one would let short messages through
    # faster than the link is.
    burst = max(64 << 10, int(bits_of(rate) / 8 * 0.002))
    shape = ("root", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms")
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, *shape)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")


def _remove_left_behind() -> None:
    for name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.split():
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name)
        if found and not Path("/proc", found[1]).exists():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _receive(address: str, connections: str) -> None:
    with socket.create_server((address, 0)) as server, selectors.DefaultSelector() as ready:
        print(server.getsockname()[1], flush=True)
        for _ in range(int(connections)):
            ready.register(server.accept()[0], selectors.EVENT_READ)
        received, began = 0, time.perf_counter()
        while ready.get_map():
            for key, _ in ready.select():
                connection = cast(socket.socket, key.fileobj)
                part = connection.recv(1 << 18)
                received += len(part)
                if not part:
                    ready.unregister(connection)
                    connection.close()
        print(8 * received / (time.perf_counter() - began))


def _send(address: str, port: str, connections: str, seconds: str) -> None:
    def work(connection: socket.socket) -> None:
        block = bytes(1 << 16)
        with connection:
            while time.perf_counter() < end:
                connection.sendall(block)

    opened = [socket.create_connection((address, int(port))) for _ in range(int(connections))]
    end = time.perf_counter() + float(seconds)
    with ThreadPoolExecutor(len(opened)) as threads:
        list(threads.map(work, opened))


if __name__ == "__main__":
    {"receive": _receive, "send": _send}[sys.argv[1]](*sys.argv[2:])
