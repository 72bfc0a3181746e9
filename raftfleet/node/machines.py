"""Importing users' state machines, in the worker that runs them and nowhere else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.machine import LeaderHook, StateMachine


class MachineLoader:
    """Makes machines and hooks from ``"module:Class"``.

    Args:
        app_dirs: put in front of ``sys.path``, first match wins.

    Modules are imported once per process: changed code is seen when the node starts again.
    """

    def __init__(self, app_dirs: Sequence[Path]) -> None:
        for folder in reversed(app_dirs):
            path = str(folder)
            if path not in sys.path:
                sys.path.insert(0, path)
        self._classes: dict[str, type] = {}

    def __call__(self, config: GroupConfig) -> tuple[Any, Any]:
        """A new machine and a new hook (or None).

        Raises:
            Exception: whatever importing or constructing raised; TypeError for a class of the wrong kind; RuntimeError
                where it was SystemExit or the like, which must not end the worker and with it all other groups.
        """
        machine = self._make(config.machine, StateMachine)
        hook = self._make(config.hook, LeaderHook) if config.hook is not None else None
        return machine, hook

    def _make(self, spec: str, base: type) -> Any:
        try:
            made = self._class(spec, base)()
            if base is StateMachine:
                made.context = CommandContext()
            return made
        except Exception:
            raise
        except BaseException as error:
            told = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise RuntimeError(f"{spec} raised {told} when it was imported or constructed") from error

    def _class(self, spec: str, base: type) -> type:
        """The class, of the right kind. One that was found once may be asked for as a machine and as a hook."""
        found = self._classes.get(spec)
        if found is None:
            module_name, _, class_name = spec.partition(":")
            importlib.invalidate_caches()
            found = importlib.import_module(module_name)  # type: ignore[assignment]
            for part in class_name.split("."):
                found = getattr(found, part)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TypeError(f"{spec} is not a subclass of raftfleet.{base.__name__}")
        self._classes[spec] = found
        return found
