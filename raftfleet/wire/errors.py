"""The one error that decoding may raise: what came from outside was not what it should have been."""

from __future__ import annotations

from raftfleet.errors import ProtocolError


class WireError(ProtocolError):
    """Bytes from outside could not be understood.

    ``reason`` is short and one of few, so that it can name a counter; the message may say more.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
