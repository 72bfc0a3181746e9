"""Bytes that are almost right: valid examples that were cut, flipped, spliced, or changed in one place of their tree.

Random bytes alone are refused at the first of them; what breaks a decoder is the input that is right up to its last
field. ``RAFTFLEET_TEST_FUZZ_EXAMPLES`` says how many are tried for each target (default 150); every run tries the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("RAFTFLEET_TEST_FUZZ_EXAMPLES", "150"))

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""For every fuzz test: the same examples everywhere, so that a red run is a bug and not luck."""

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64 - 1]),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=20),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(-5, 300), st.binary(max_size=4)), inner, max_size=4),
    ),
    max_leaves=12,
)
"""Whatever msgpack carries."""


@st.composite
def damaged(draw: Callable[..., Any], examples: Sequence[bytes], *, packed: bool = True) -> bytes:
    """Bytes made of one of ``examples``; ``packed``: they are msgpack, and may be changed as what they mean."""
    data = bytearray(draw(st.sampled_from(list(examples))))
    kind = draw(st.integers(0, 5 if packed else 3))
    if kind == 0:
        return bytes(draw(st.binary(max_size=200)))
    if kind == 1:
        return bytes(data[: draw(st.integers(0, len(data)))])
    if kind == 2:
        for _ in range(draw(st.integers(1, 6))):
            if data:
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    if kind == 3:
        other = draw(st.sampled_from(list(examples)))
        return bytes(data[: draw(st.integers(0, len(data)))]) + other[draw(st.integers(0, len(other))) :]
    tree = msgpack.unpackb(bytes(data), raw=False, strict_map_key=False)
    for _ in range(draw(st.integers(1, 2))):
        tree = draw(changed(tree))
    return pack(tree)


def pack(tree: Any) -> bytes:
    """What can be packed of a tree of values; surrogates, which text may hold, are replaced."""
    return bytes(msgpack.packb(tree, use_bin_type=True, unicode_errors="replace"))


@st.composite
def changed(draw: Callable[..., Any], tree: Any) -> Any:
    """The tree with something else in one place of it."""
    if isinstance(tree, (list, tuple)) and tree and draw(st.integers(0, 3)):
        items = list(tree)
        at = draw(st.integers(0, len(items) - 1))
        what = draw(st.integers(0, 6))
        if what == 0:
            del items[at]
        elif what == 1:
            items.insert(at, draw(values))
        else:
            items[at] = draw(changed(items[at]))
        return items
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree, key=repr)))
        rest = {k: v for k, v in tree.items() if k != key}
        return rest if draw(st.integers(0, 6)) == 0 else {**rest, key: draw(changed(tree[key]))}
    return draw(values)
