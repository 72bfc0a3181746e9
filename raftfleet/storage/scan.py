"""Reads a segment: finds its batches, and tells what is wrong without judging it yet.

Whether a bad place is damage or the torn tail depends on what follows, perhaps in the next segment, so this module only
reports; :mod:`raftfleet.storage.recovery` judges. No files here: a segment comes in as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from raftfleet.storage.records import (
    DATA_START,
    MARK,
    Mark,
    Record,
    as_mark,
    find_mark,
    mark_length,
    read_record,
)


class BadRecord(NamedTuple):
    """A record that its batch's mark lists but that is not whole."""

    offset: int
    uid: int
    length: int


class Batch(NamedTuple):
    """One batch. ``records``: (ordinal, offset, record) of the good ones; ``mark_lost``: all but its mark is good."""

    number: int
    start: int
    end: int
    records: list[tuple[int, int, Record]]
    bad: list[BadRecord]
    mark_lost: bool = False


class Lost(NamedTuple):
    """Batches ``[first, stop)`` that are there no more, in bytes ``[start, end)``: whose they were is unknown."""

    first: int
    stop: int
    start: int
    end: int


class Tail(NamedTuple):
    """The end: where batch ``number`` would begin.

    ``end``: where nothing but zeros follows (``start`` if the segment ends cleanly). ``batch``: what the records there
    would be if nothing but a mark were missing, else None.
    """

    number: int
    start: int
    end: int
    batch: Batch | None


def scan_segment(data: bytes, sequence: int, instance: int, first_batch: int) -> Iterator[Batch | Lost | Tail]:
    """All that is in a segment, in order; the last item is its Tail.

    ``first_batch``: number of the first batch; 0: take it from the first mark (the header is lost).
    """
    number = first_batch
    start = DATA_START
    if not number:
        mark = find_mark(data, start, sequence, instance)
        number = mark.batch if mark is not None else 0
    while True:
        records, at, mark = _read_batch(data, start, sequence, instance, number)
        if mark is not None:
            yield Batch(number, start, mark.end, records, [])
            start = mark.end
            number += 1
            continue
        mark = _next_mark(data, start, at, sequence, instance, number)
        if mark is None:
            yield _tail(data, start, at, number, records)
            return
        if mark.batch == number and mark.start == start:
            yield _by_directory(data, mark)
            start = mark.end
            number += 1
            continue
        if mark.batch == number + 1 and mark.start - at == mark_length(len(records)):
            yield Batch(number, start, mark.start, records, [], mark_lost=True)
        else:
            if records:
                # They are whole, and later batches prove that they were durable.
                yield Batch(number, start, at, records, [], mark_lost=True)
            yield Lost(number, mark.batch, at, mark.start)
        start = mark.start
        number = mark.batch


def _read_batch(
    data: bytes, start: int, sequence: int, instance: int, number: int
) -> tuple[list[tuple[int, int, Record]], int, Mark | None]:
    """Records from ``start`` up to their mark, or up to the first that is not whole: ``(records, where, mark)``."""
    records: list[tuple[int, int, Record]] = []
    at = start
    while True:
        record = read_record(data, at)
        if record is None:
            return records, at, None
        if record.kind == MARK:
            mark = as_mark(record, at, sequence, instance)
            if mark is None or mark.start != start or mark.batch != number or record.count != len(records):
                return records, at, None
            return records, at, mark
        records.append((len(records), at, record))
        at += record.length


def _next_mark(data: bytes, start: int, at: int, sequence: int, instance: int, number: int) -> Mark | None:
    """The first mark at or after ``at`` of this batch or a later one."""
    while True:
        mark = find_mark(data, at, sequence, instance)
        if mark is None:
            return None
        if (mark.batch == number and mark.start == start) or (mark.batch > number and mark.start >= at):
            return mark
        at = mark.offset + 1


def _by_directory(data: bytes, mark: Mark) -> Batch:
    """A batch with something bad in it, taken apart with the help of its mark."""
    records = []
    bad = []
    at = mark.start
    for ordinal, (uid, length) in enumerate(mark.records):
        record = read_record(data, at)
        if record is not None and (record.uid, record.length) == (uid, length):
            records.append((ordinal, at, record))
        else:
            bad.append(BadRecord(at, uid, length))
        at += length
    return Batch(mark.batch, mark.start, mark.end, records, bad)


def _tail(data: bytes, start: int, at: int, number: int, records: list[tuple[int, int, Record]]) -> Tail:
    end = max(len(data.rstrip(b"\0")), start)
    batch = None
    if at < end <= at + mark_length(len(records)):
        batch = Batch(number, start, at + mark_length(len(records)), records, [], mark_lost=True)
    return Tail(number, start, end, batch)
