import pytest

from ps_accordion.errors import ConfigError
from ps_accordion.wire.addresses import check_address

WITHIN = [
    "tcp://127.0.0.1:5650",
    "tcp://127.0.0.1:*",
    "tcp://127.8.9.10:1",
    "tcp://[::1]:65535",
    "tcp://localhost:0",
    "ipc:///tmp/socket",
]
BEYOND = [
    "tcp://0.0.0.0:5650",
    "tcp://*:5650",
    "tcp://[::]:5650",
    "tcp://10.0.0.7:*",
    "tcp://192.168.1.1:80",
    "tcp://[fe80::1]:80",
    "tcp://169.254.0.1:80",
    "tcp://eth0:80",
    "tcp://example.org:80",
    "tcp://localhost.example.org:80",
    "tcp://127.0.0.1.example.org:80",
    "tcp://user@127.0.0.1:80",
    "tcp://127.0.0.1;10.0.0.7:80",
]
NEITHER = [
    "",
    "127.0.0.1:5650",
    "tcp:127.0.0.1:5650",
    "tcp://",
    "tcp://127.0.0.1",
    "tcp://:5650",
    "tcp://[::1]",
    "tcp://127.0.0.1:",
    "tcp://127.0.0.1:http",
    "tcp://127.0.0.1:70000",
    "tcp://127.0.0.1:-1",
    "tcp://127.0.0.1:5650/path",
    "udp://127.0.0.1:5650",
    "http://127.0.0.1:80",
    "inproc://name",
    "ipc://",
]


@pytest.mark.parametrize("address", WITHIN)
def test_addresses_within_this_machine_are_open_to_all(address: str) -> None:
    """Loopback and ipc need no permission."""
    check_address(address, insecure=False, where="x")


@pytest.mark.parametrize("address", BEYOND)
def test_addresses_beyond_this_machine_need_permission(address: str) -> None:
    """The message names the setting and the flag; with the flag they are taken."""
    with pytest.raises(ConfigError, match=r"^servers.bind = .* can be reached from other machines.*--insecure"):
        check_address(address, insecure=False, where="servers.bind")
    check_address(address, insecure=True, where="servers.bind")


@pytest.mark.parametrize("address", NEITHER)
@pytest.mark.parametrize("insecure", [True, False])
def test_what_is_no_address_is_refused_in_any_case(address: str, insecure: bool) -> None:
    """Also a port that ZeroMQ would take modulo 65536."""
    with pytest.raises(ConfigError, match=r"^x = .*expected tcp://host:port"):
        check_address(address, insecure=insecure, where="x")
