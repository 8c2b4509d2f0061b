"""Which network interface leads to another machine."""

from __future__ import annotations

import socket
import struct

_SIOCGIFADDR = 0x8915  # of Linux: asks for the address of an interface


def local_address_towards(host: str) -> str:
    """Return the address of this machine that packets to `host` leave from; sends none.

    :raises OSError: there is no way to it.
    """
    info = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
        probe.connect(info[4])
        address: str = probe.getsockname()[0]
        return address


def interface_towards(host: str) -> str | None:
    """Name the interface that packets to `host` leave by; `None` where that cannot be told."""
    try:
        import fcntl  # noqa: PLC0415  only on Unix

        address = local_address_towards(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # it has no address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except (OSError, ImportError):
        return None
    return None
