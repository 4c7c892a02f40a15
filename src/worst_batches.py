"""The micro-batches of a run that ask for the most memory, found from lengths and counts alone.

    found = worst_of_run(feed, flat=collator.flat)
    found.worst["most tokens"]           # Demand(tokens=1024, supervised=310, longest=97, packs=(4, 17))
    found.tokens                         # of all micro-batches of the run, padding included

A run of packed rows is known before it begins, every epoch of it; of a stream the first steps alone are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.batches import PackFeed, Packs
from src.packing import FILLER, IGNORED, LENGTHS_AT_ONCE, PackedRows
from src.streaming import StreamFeed

STREAM_STEPS = 64
"""Steps of a stream that are looked at."""

KINDS = ("most tokens", "most supervised tokens", "longest document")
"""What micro-batches are compared by, padding counted as tokens."""

_PAGE_NUMBERS = 1024  # int32 numbers in a page of 4 KiB


@dataclass(frozen=True)
class Demand:
    """What a micro-batch asks for."""

    tokens: int
    """With padding."""

    supervised: int
    longest: int
    """Tokens of its longest document."""

    packs: tuple[int, ...] = ()
    """Indices of its packs; empty for one of a stream."""


@dataclass(frozen=True)
class FoundBatches:
    """What a run's micro-batches ask for, at most and in all."""

    worst: dict[str, Demand]
    """By its kind, of `KINDS`."""

    fed: dict[str, Packs]
    """The same micro-batches, as the feed gives them."""

    tokens: int
    """Of all micro-batches of all processes in the run, padding included; of a stream as its first steps have it."""


def supervised_counts(packs: PackedRows) -> np.ndarray:
    """Supervised tokens of every row, int64 (rows,). The pages of the table are mapped by it, ids included, as they are
    in the course of a run."""
    counts = []
    for part in packs.rows.iter(batch_size=LENGTHS_AT_ONCE):
        for name in ("input_ids", "labels"):
            for chunk in part[name].chunks:
                values = chunk.flatten().to_numpy()
                if name == "input_ids":
                    values[::_PAGE_NUMBERS].sum()
                elif len(chunk):
                    lengths = chunk.value_lengths().to_numpy()
                    ends = np.cumsum(lengths)
                    seen = np.concatenate(([0], np.cumsum(values != IGNORED)))
                    counts.append(seen[ends] - seen[ends - lengths])
    return np.concatenate(counts).astype(np.int64) if counts else np.zeros(0, dtype=np.int64)


def demands_of_packs(packs: PackedRows) -> np.ndarray:
    """Tokens, supervised tokens and tokens of the longest document of every pack, int64 (packs, 3)."""
    sizes = [len(pack) for pack in packs.packs]
    order = np.fromiter(itertools.chain.from_iterable(packs.packs), dtype=np.int64, count=sum(sizes))
    starts = np.cumsum([0, *sizes[:-1]])
    supervised = np.add.reduceat(supervised_counts(packs)[order], starts)
    longest = np.maximum.reduceat(packs.lengths[order], starts)
    return np.stack((packs.pack_tokens, supervised, longest), axis=1)


def demands_of_batches(batches: Sequence[Sequence[int]], of_packs: np.ndarray, *, flat: bool) -> np.ndarray:
    """The same of micro-batches, int64 (micro-batches, 3), where tokens count the padding.

    Args:
        batches: each the indices of its packs.
        of_packs: int64 (packs, 3).
        flat: whether packs stand end to end, without padding.
    """
    sizes = np.array([len(batch) for batch in batches])
    order = np.fromiter(itertools.chain.from_iterable(batches), dtype=np.int64, count=int(sizes.sum()))
    starts = np.cumsum(sizes) - sizes
    filler = np.array([[1, 0, 1]])
    parts = np.concatenate((of_packs, filler))[order]  # FILLER, -1, is the last
    tokens = np.add.reduceat(parts[:, 0], starts) if flat else sizes * np.maximum.reduceat(parts[:, 0], starts)
    supervised = np.add.reduceat(parts[:, 1], starts)
    longest = np.maximum.reduceat(parts[:, 2], starts)
    return np.stack((tokens, supervised, longest), axis=1)


def worst_of_run(feed: PackFeed | StreamFeed, *, flat: bool) -> FoundBatches:
    """The worst micro-batches of a run, of whichever process they are.

    Args:
        feed: where it stands before the run.
        flat: whether packs stand end to end in a micro-batch, without padding.
    """
    if isinstance(feed, StreamFeed):
        return _worst_of_stream(feed, flat=flat)
    assert FILLER == -1
    of_packs = demands_of_packs(feed.packs)
    worst: dict[str, Demand] = {}
    total, left, epoch = 0, feed.steps * feed.split.micro_batches, 0
    while left > 0:
        batches = feed.epoch(epoch)[:left]
        demands = demands_of_batches(batches, of_packs, flat=flat)
        for column, kind in enumerate(KINDS):
            index = int(demands[:, column].argmax())
            if kind not in worst or demands[index, column] > _column(worst[kind], column):
                worst[kind] = Demand(*map(int, demands[index]), packs=tuple(batches[index]))
        total += int(demands[:, 0].sum())
        left, epoch = left - len(batches), epoch + 1
    fed = {kind: [feed.packs[index] for index in demand.packs] for kind, demand in worst.items()}
    return FoundBatches(worst, fed, total)


def _worst_of_stream(feed: StreamFeed, *, flat: bool) -> FoundBatches:
    worst: dict[str, Demand] = {}
    fed: dict[str, Packs] = {}
    tokens = seen = 0
    for step, _ in itertools.islice(feed.marked_steps(), min(STREAM_STEPS, feed.steps)):
        for packs in step:
            demand = _demand(packs, flat=flat)
            tokens, seen = tokens + demand.tokens, seen + 1
            for column, kind in enumerate(KINDS):
                if kind not in worst or _column(demand, column) > _column(worst[kind], column):
                    worst[kind], fed[kind] = demand, packs
    return FoundBatches(worst, fed, round(tokens / seen * feed.steps * feed.split.micro_batches))


def _column(demand: Demand, column: int) -> int:
    return (demand.tokens, demand.supervised, demand.longest)[column]


def _demand(packs: Packs, *, flat: bool) -> Demand:
    lengths = [len(pack["input_ids"]) for pack in packs]
    return Demand(
        tokens=sum(lengths) if flat else len(packs) * max(lengths),
        supervised=sum(int((pack["labels"] != IGNORED).sum()) for pack in packs),
        longest=max(int(max(pack["lengths"])) for pack in packs),
    )


def tokens_of(micro_batches: Sequence[Packs], *, flat: bool) -> int:
    """Tokens of some micro-batches, padding included."""
    return sum(_demand(packs, flat=flat).tokens for packs in micro_batches)


def worst_evaluation(packs: PackedRows, rows: int) -> tuple[list[int], int, int]:
    """The packs of the evaluation batches with most tokens and with most supervised tokens.

    Args:
        rows: packs of a batch; they come in order.
    Returns:
        Indices of packs, those batches' tokens with padding, and those of all batches together.
    """
    batches = [list(range(start, min(start + rows, len(packs)))) for start in range(0, len(packs), rows)]
    demands = demands_of_batches(batches, demands_of_packs(packs), flat=False)
    chosen = sorted({int(demands[:, column].argmax()) for column in (0, 1)})
    indices = [index for batch in chosen for index in batches[batch]]
    return indices, int(demands[chosen, 0].sum()), int(demands[:, 0].sum())
