"""Addresses of sockets: `tcp://host:port`, with `*` for any port, and `ipc://path`."""

from __future__ import annotations

import ipaddress
import socket as sockets

from ..errors import ConfigError

__all__ = ["check_address", "is_alive", "port_of"]


def check_address(address: str, *, insecure: bool, where: str) -> None:
    """Refuse to listen beyond this machine without encryption, unless told to.

    Args:
        address: A ZeroMQ address: `ipc://path` or `tcp://host:port`.
        insecure: Whether the user said that it may.
        where: The setting that the address comes from, for the message.

    Raises:
        ConfigError: The address is none, or reaches beyond this machine.
    """
    scheme, _, place = address.partition("://")
    if scheme == "ipc" and place:
        return
    host, _, port = place.rpartition(":")
    # ZeroMQ would take port 70000 for port 4464.
    if scheme != "tcp" or not host or not (port == "*" or (port.isascii() and port.isdigit() and int(port) < 1 << 16)):
        raise ConfigError(f"{where} = {address!r}: expected tcp://host:port, with a port of 0 to 65535 or *, or ipc://path")
    host = host.removeprefix("[").removesuffix("]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not insecure:
        raise ConfigError(
            f"{where} = {address!r} can be reached from other machines, and this release does not encrypt; "
            "listen at 127.0.0.1, or add --insecure if the network is trusted"
        )


def is_alive(address: str) -> bool:
    """Whether somebody listens at an ipc address. ZeroMQ itself would take the path over without a word."""
    path = address.removeprefix("ipc://")
    if path == address:
        return False
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def port_of(address: str) -> int:
    """Return the port of an address; 0 of one that has none."""
    port = address.rpartition(":")[2]
    return int(port) if address.startswith("tcp://") and port.isascii() and port.isdigit() else 0
