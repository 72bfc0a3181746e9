"""Breaking one function of the package on purpose, for the time of a ``with``: how tests are shown to be able to fail.

A mutant is told as text: in that function, this piece of source becomes that one. So the table of mutants reads as a
list of one-line diffs, the production code holds no switches, and a mutant whose piece is no longer there says so
instead of breaking nothing. The function keeps its identity (only its code object is exchanged), so it is broken
wherever it was already imported or kept in a table.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

_ANNOTATIONS = annotations.compiler_flag
"""As every module of the package has it: annotations name what is imported for type checkers only."""


class MutantOutdated(Exception):
    """The code that a mutant breaks has changed: bring the mutant's text in line with it."""


class Change(NamedTuple):
    """In ``where`` (``"module:function"`` or ``"module:Class.method"``) the text ``old``, once, becomes ``new``.

    Lines after the first keep their indentation relative to the function's ``def``.
    """

    where: str
    old: str
    new: str


def _find(where: str) -> types.FunctionType:
    module_name, _, path = where.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    if not isinstance(found, types.FunctionType):
        raise MutantOutdated(f"{where} is no function")
    return found


def _rewritten(function: types.FunctionType, changes: list[Change]) -> types.CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    for change in changes:
        if source.count(change.old) != 1:
            raise MutantOutdated(f"{change.where} holds {change.old!r} {source.count(change.old)} times, not once")
        source = source.replace(change.old, change.new)
    source = "\n".join(line for line in source.split("\n") if not line.startswith("@"))
    file_name = inspect.getsourcefile(function) or "?"
    first_line = function.__code__.co_firstlineno
    scope: dict[str, Any] = {}
    code = compile("\n" * (first_line - 1) + source, file_name, "exec", flags=_ANNOTATIONS, dont_inherit=True)
    exec(code, function.__globals__, scope)
    made = scope[function.__name__]
    if made.__code__.co_freevars != function.__code__.co_freevars:
        raise MutantOutdated(f"{function.__qualname__} is a closure, which cannot be exchanged")
    code_object: types.CodeType = made.__code__
    return code_object


@contextlib.contextmanager
def broken(changes: tuple[Change, ...]) -> Iterator[None]:
    """Apply all changes, and take them back at the end.

    Raises:
        MutantOutdated: a text to be changed is not there, or not unique.
    """
    by_function: dict[types.FunctionType, list[Change]] = {}
    for change in changes:
        by_function.setdefault(_find(change.where), []).append(change)
    codes = {function: _rewritten(function, rows) for function, rows in by_function.items()}
    originals = {function: function.__code__ for function in codes}
    try:
        for function, code in codes.items():
            function.__code__ = code
        yield
    finally:
        for function, original in originals.items():
            function.__code__ = original
