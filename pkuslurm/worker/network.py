"""Addresses, interfaces and ports of this node, seen from the nodes that it must meet. Standard library only."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from pkuslurm.errors import PkuslurmError

_SIOCGIFADDR = 0x8915
_ANYWHERE = "192.0.2.1"  # nobody's (RFC 5737): the way there is the default route
# Below the ports that Linux hands out to clients (32768 upwards) and HCCL's (60000 upwards).
FIRST_PORT, PORTS = 10000, 18000


def resolve(host: str) -> str:
    """The IPv4 address of ``host``; IPv6 is not asked for: a dead resolver costs 10 s each. Raises PkuslurmError."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise PkuslurmError(f"{host}: its address cannot be found here ({error.strerror or error})") from None
    return str(found[0][4][0])


def address_towards(host: str) -> str:
    """This node's address on the way to ``host``: the one at which ``host`` reaches it. Sends nothing.

    Not the address of the own name: Debian writes that as 127.0.1.1 into /etc/hosts, where nobody else finds it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((resolve(host), 9))
        except OSError as error:
            raise PkuslurmError(f"{host}: there is no way to it from here ({error.strerror or error})") from None
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def interface_of(address: str) -> str | None:
    """The name of the interface that has ``address``; None: there is none on this node."""
    return next((name for own, name in _interfaces() if own == address), None)


def _interfaces() -> Iterator[tuple[str, str]]:
    """The IPv4 addresses of this node, each with the name of its interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            yield socket.inet_ntoa(answer[20:24]), name


def own_address(wanted: str) -> str:
    """At which others may reach this node, where nobody has said who they are: ``wanted``, if it is this node's (what
    a platform tells is another one's at times), else the one of the default route, else any. Sends nothing."""
    if wanted and interface_of(wanted) is not None:
        return wanted
    for towards in (_ANYWHERE, socket.gethostname()):
        with suppress(PkuslurmError):
            if not is_loopback(found := address_towards(towards)):
                return found
    return next((address for address, _ in _interfaces() if not is_loopback(address)), "127.0.0.1")


def is_free(port: int) -> bool:
    """Whether nobody listens on ``port`` here; connections of before that still fade away do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def free_port(seed: int) -> int:
    """A port that nobody listens on here now. Two jobs of different ``seed`` on one node look from different places."""
    for offset in range(PORTS):
        port = FIRST_PORT + (seed + offset) % PORTS
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise PkuslurmError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free on this node")
