"""Rows grouped into packs, and packs collated into batches.

A row is one document of tokens. A pack is rows set end to end, with positions that start again at 0 for each, from
which attention takes the borders: no row sees another. Without packing every pack holds one row.

    packed = PackedRows(rows, max_length=1024, packing=True)
    batch = PackCollator(pad_token_id=0)([packed[0], packed[1]])

Shapes: B packs in a batch, L tokens in the longest of them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from pyarrow import compute

from config.schema import DataConfig

IGNORED = -100
"""The label of a token that the loss does not count, as in transformers and torch."""

PERCENTILES = (0, 10, 50, 90, 99, 100)

LENGTHS_AT_ONCE = 10_000
"""Rows whose lengths are looked up at once."""

FILLER = -1
"""The index of a pack of one unsupervised token, which fills the last step and adds nothing to the loss."""


def best_fit_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group rows into packs of at most `capacity` tokens, longest first, each filled to the last token if it can be.

    A pack takes the longest row that is left, and then again the longest that fits, until one row or two together are
    as long as its room; these end it. Plain best-fit decreasing has no choice of the last rows: of rows of about 500
    tokens it puts four into packs of 2048, and later finds nothing for the room beside them. The lengths that are left
    are the bits of one integer, so that a look-up takes a few shifts, whatever the number of rows.

    Args:
        lengths: tokens per row, each in 1..capacity.
        capacity: tokens per pack.
    Returns:
        Packs of indices into `lengths`; every index appears exactly once. Equal inputs give equal packs.
    Raises:
        ValueError: a length is 0 or above `capacity`.
    Source: best-fit decreasing; its use for language models in arXiv:2404.10830.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} has {sizes[wrong[0]]} tokens; a pack takes 1 to {capacity}")
    left = _RowsLeft(sizes, capacity)
    packs: list[list[int]] = []
    while left.lengths:
        pack: list[int] = []
        room = capacity
        while room and (fitting := left.ending(room) or left.longest(room)):
            pack += map(left.take, fitting)
            room -= sum(fitting)
        packs.append(pack)
    return packs


class _RowsLeft:
    """Rows by length: bit n of `lengths`, and bit capacity - n of `mirror`, say that a row of n tokens is left."""

    def __init__(self, sizes: np.ndarray, capacity: int) -> None:
        self.capacity = capacity
        self.order = np.argsort(sizes, kind="stable").tolist()
        counts = np.bincount(sizes, minlength=capacity + 1)
        self.counts: list[int] = counts.tolist()
        self.next: list[int] = (np.cumsum(counts) - counts).tolist()  # where in `order` a length's next row is
        self.lengths = sum(1 << length for length in np.flatnonzero(counts).tolist())
        self.mirror = sum(1 << (capacity - length) for length in np.flatnonzero(counts).tolist())

    def longest(self, room: int) -> tuple[int, ...]:
        """The greatest length of at most `room`; nothing if there is none."""
        fitting = self.lengths & ((1 << (room + 1)) - 1)
        return (fitting.bit_length() - 1,) if fitting else ()

    def ending(self, room: int) -> tuple[int, ...]:
        """A length, or two, that are `room` together; nothing if there are none."""
        if self.lengths >> room & 1:
            return (room,)
        pairs = self.lengths & (self.mirror >> (self.capacity - room))  # bit n: rows of n and room - n tokens are left
        longer = pairs.bit_length() - 1
        if longer * 2 == room and self.counts[longer] < 2:
            return ()  # the longer of a pair is half the room: that row would be both
        return (longer, room - longer) if pairs else ()

    def take(self, length: int) -> int:
        """The next row of a length."""
        index = self.order[self.next[length]]
        self.next[length] += 1
        self.counts[length] -= 1
        if not self.counts[length]:
            self.lengths ^= 1 << length
            self.mirror ^= 1 << (self.capacity - length)
        return index


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of every row, int64 (rows,), told from Arrow's offsets without reading the tokens."""
    table = rows.select_columns("input_ids").with_format("arrow")
    parts = [compute.list_value_length(part["input_ids"]).to_numpy() for part in table.iter(batch_size=LENGTHS_AT_ONCE)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def length_percentiles(lengths: np.ndarray) -> dict[str, int]:
    """The tokens that so many in a hundred rows have at most; nothing if there are no rows."""
    told = np.percentile(lengths, PERCENTILES, method="inverted_cdf") if len(lengths) else []
    return {str(share): int(length) for share, length in zip(PERCENTILES, told, strict=False)}


class PackedRows(torch.utils.data.Dataset):
    """Token rows as packs of row numbers, looked up in the rows' table when they are asked for.

    Item i is a dict of `input_ids` and `labels`, each an int32 array of the pack's tokens that may be a view of the
    table, and of `lengths`, the tokens of each of its rows.
    """

    def __init__(self, rows: Dataset, *, max_length: int, packing: bool) -> None:
        """
        Args:
            rows: columns `input_ids` and `labels` (-100 where not supervised, and always at a row's first token).
            max_length: tokens per pack; no row is longer.
            packing: whether a pack may hold several rows.
        """
        self.rows = rows.select_columns(["input_ids", "labels"]).with_format("arrow")
        self._origins = rows.select_columns(["origin"]) if "origin" in rows.column_names else None
        self.lengths = row_lengths(rows)
        self.packs = best_fit_bins(self.lengths, max_length) if packing else [[index] for index in range(len(rows))]
        starts = np.cumsum([0, *(len(pack) for pack in self.packs[:-1])])
        order = np.fromiter(itertools.chain.from_iterable(self.packs), dtype=np.int64, count=len(rows))
        self.pack_tokens = np.add.reduceat(self.lengths[order], starts) if self.packs else self.lengths
        """Tokens of every pack, int64 (packs,)."""

    @classmethod
    def of(cls, rows: Dataset, config: DataConfig) -> "PackedRows":
        """The packs of a run's rows, as its config has them."""
        return cls(rows, max_length=config.max_length, packing=config.packing)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == FILLER:
            nothing = np.zeros(1, dtype=np.int32)
            return {"input_ids": nothing, "labels": nothing + IGNORED, "lengths": np.ones(1, dtype=np.int64)}
        table = self.rows[self.packs[index]]
        ids, labels = (_values(table[name]) for name in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels, "lengths": self.lengths[self.packs[index]]}

    def origins(self, index: int) -> list[str]:
        """Where each row of a pack was read, as `file line N`; or its number in the table, where that is not known."""
        rows = self.packs[index]
        return [f"row {row}" for row in rows] if self._origins is None else self._origins[rows]["origin"]

    def packs_rows(self) -> bool:
        """Whether some rows share a pack."""
        return len(self.packs) < len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return int(self.lengths.sum())

    def describe(self, max_length: int) -> dict[str, Any]:
        """Counts for the run's record: rows, packs, tokens, the share of the packs' room that tokens fill, and the
        tokens that so many in a hundred rows have at most.
        """
        return {
            "rows": len(self.lengths),
            "packs": len(self.packs),
            "tokens": self.tokens,
            "fill": round(self.tokens / max(1, len(self.packs) * max_length), 4),
            "length_percentiles": length_percentiles(self.lengths),
        }


def _values(column: pyarrow.ChunkedArray) -> np.ndarray:
    """All numbers of a column of lists, end to end."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class PackCollator:
    """Packs padded on the right to the longest of them.

    No attention mask is made. Padding comes after the last row of its pack, with positions that count on from it, so no
    token of a row can see it, and its label is never supervised.
    """

    pad_token_id: int
    flat: bool = False
    """Whether packs stand end to end in one row without padding, for attention that takes borders."""
    tells_longest: bool = False
    """Whether attention is told the borders, for which the batch holds the length of its longest document too."""

    def __call__(self, packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor | int]:
        """
        Returns:
            `input_ids`, `labels`, `position_ids`: int64 tensors of shape (B, L), or (1, tokens) if `flat`; and
            `document_borders`: int32, (documents + 1,), where in all rows of the batch, one after the other, each
            document starts, and then their end. It is what variable-length attention calls `cu_seqlens`. Padding
            belongs to the last document before it. `supervised_places`: int64, (supervised tokens,), the positions
            before them, counted through all rows of the batch. Unless `flat` also `row_tokens`: int64, (B,), the
            tokens of each row without padding. With `tells_longest` also `longest_document`: its tokens, as a number of
            the host.
        """
        tokens = [len(pack["input_ids"]) for pack in packs]
        shape = (1, sum(tokens)) if self.flat else (len(packs), max(tokens))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        starts = np.cumsum([0, *tokens[:-1]]) if self.flat else np.arange(len(packs)) * shape[1]
        for pack, start, length in zip(packs, starts, tokens, strict=True):
            input_ids.reshape(-1)[start : start + length] = pack["input_ids"]
            labels.reshape(-1)[start : start + length] = pack["labels"]
        documents = [start + np.cumsum([0, *pack["lengths"][:-1]]) for pack, start in zip(packs, starts, strict=True)]
        borders = np.concatenate([*documents, [input_ids.size]])
        next_labels = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        position_ids = np.arange(input_ids.size) - np.repeat(borders[:-1], np.diff(borders))
        more = {} if self.flat else {"row_tokens": torch.tensor(tokens)}
        if self.tells_longest:
            more["longest_document"] = int(np.diff(borders).max())
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids.reshape(shape)),
            "document_borders": torch.from_numpy(borders.astype(np.int32)),
            **more,
            "supervised_places": torch.from_numpy(np.flatnonzero(next_labels != IGNORED)),
        }
