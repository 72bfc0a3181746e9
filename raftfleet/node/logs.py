"""How a node logs: to stderr, each line with the node and the process that wrote it, as text or as JSON.

Every process of a node calls :func:`configure` once, after its fork; the lines of all of them share one stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import time

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, level: str, format: str, node: str, process: str) -> None:
    """Send the log of this process to stderr, instead of where it went before.

    Args:
        level: a key of :data:`LEVELS`.
        format: ``"text"`` or ``"json"``.
        node: the node's name.
        process: which of its processes this is, such as ``shard-0``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(node, process) if format == "json" else TextFormatter(node, process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])


def _timestamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """``2026-01-02T03:04:05.678Z INFO n1/shard-0 what happened``: for people and for grep."""

    def __init__(self, node: str, process: str) -> None:
        super().__init__()
        self._origin = f"{node}/{process}"

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, followed by its traceback if it has one."""
        line = f"{_timestamp(record)} {record.levelname} {self._origin} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, node, process, logger, message, and exception where there is one."""

    def __init__(self, node: str, process: str) -> None:
        super().__init__()
        self._origin = {"node": node, "process": process}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        fields = {"time": _timestamp(record), "level": record.levelname.lower(), **self._origin}
        fields |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
