"""Messages to the service manager, where there is one (``man sd_notify``)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def sd_notify(*lines: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send ``READY=1``, ``STATUS=…``, ``STOPPING=1`` or the like to systemd.

    Any process of the node may send it (``NotifyAccess=all`` in the unit). Never raises and never blocks: a service
    manager that does not listen is no reason for a node to end.

    Returns:
        Whether something was sent; False where ``NOTIFY_SOCKET`` is not set.
    """
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract name space
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sender:
            sender.sendto("\n".join(lines).encode(), address)
    except OSError:
        return False
    return True
