"""No input may raise anything but the declared error, whichever decoder it reaches."""

from __future__ import annotations

import pytest
from fuzz.garbage import damaged, fuzzed
from fuzz.targets import targets
from hypothesis import given
from hypothesis import strategies as st

TARGETS = targets()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_examples_are_taken(name: str) -> None:
    """Else the fuzzer would knock at a closed door."""
    target = TARGETS[name]
    if name != "command to a fleet":  # some of which are refused
        for example in target.examples:
            target.decode(example)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_but_the_declared_error_is_raised(name: str) -> None:
    target = TARGETS[name]

    @fuzzed
    @given(data=damaged(target.examples, packed=target.is_msgpack))
    def attack(data: bytes) -> None:
        try:
            target.decode(data)
        except target.declared:
            pass

    attack()


@fuzzed
@given(st.binary(max_size=64))
def test_random_bytes_reach_every_decoder(data: bytes) -> None:
    for name, target in TARGETS.items():
        try:
            target.decode(data)
        except target.declared:
            pass
        except Exception as error:
            raise AssertionError(f"{name} raised {error!r}") from error
