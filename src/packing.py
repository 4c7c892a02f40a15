"""Rows grouped into packs, and packs made into batches.

A row is one document of tokens. A pack is rows set end to end, with positions that start again at 0 for each, from
which attention takes the borders: no row sees another. Without packing every pack holds one row.

    packed = PackedRows(rows, max_length=1024, packing=True)
    batch = PackCollator(pad_token_id=0)([packed[0], packed[1]])

Shapes: B packs in a batch, L tokens in the longest of them.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from config.schema import DataConfig

IGNORED = -100
"""The label of a token that the loss does not count, as in transformers and torch."""

FILLER = -1
"""The index of a pack of one unsupervised token, which fills the last global batch and adds nothing to the loss."""


def best_fit_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group rows into packs of at most `capacity` tokens, longest first, each into the fullest pack that has room.

    Args:
        lengths: tokens per row, each in 1..capacity.
        capacity: tokens per pack.
    Returns:
        Packs of indices into `lengths`; every index appears exactly once. Equal inputs give equal packs.
    Raises:
        ValueError: a length is 0 or above `capacity`.
    Source: best-fit decreasing; its use for language models in arXiv:2404.10830.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"row {index} has {length} tokens; a pack takes 1 to {capacity}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    packs: list[list[int]] = []
    packs_with_room: dict[int, list[int]] = {}  # room left -> packs that have it
    rooms: list[int] = []  # the keys above, ascending
    for index in order:
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[place]
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                del packs_with_room[room], rooms[place]
        packs[pack].append(index)
        left = room - lengths[index]
        if left:
            if left not in packs_with_room:
                bisect.insort(rooms, left)
                packs_with_room[left] = []
            packs_with_room[left].append(pack)
    return packs


class PackedRows(torch.utils.data.Dataset):
    """Token rows as packs, put together when they are asked for.

    Item i is a dict of `input_ids`, `labels` and `position_ids`, each an int64 array of the pack's length.
    """

    def __init__(self, rows: Dataset, *, max_length: int, packing: bool) -> None:
        """
        Args:
            rows: columns `input_ids` and `labels` (-100 where not supervised, and always at a row's first token).
            max_length: tokens per pack; no row is longer.
            packing: whether a pack may hold several rows.
        """
        self.rows = rows.with_format("numpy", columns=["input_ids", "labels"])
        self.lengths = [len(ids) for ids in rows.with_format("arrow")["input_ids"]] if len(rows) else []
        self.packs = best_fit_bins(self.lengths, max_length) if packing else [[index] for index in range(len(rows))]

    @classmethod
    def of(cls, rows: Dataset, config: DataConfig) -> "PackedRows":
        """The packs of a run's rows, as its config has them."""
        return cls(rows, max_length=config.max_length, packing=config.packing)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == FILLER:
            return {
                "input_ids": np.zeros(1, dtype=np.int64),
                "labels": np.full(1, IGNORED, dtype=np.int64),
                "position_ids": np.zeros(1, dtype=np.int64),
            }
        rows = [self.rows[row] for row in self.packs[index]]
        return {
            "input_ids": np.concatenate([row["input_ids"] for row in rows]).astype(np.int64),
            "labels": np.concatenate([row["labels"] for row in rows]).astype(np.int64),
            "position_ids": np.concatenate([np.arange(len(row["input_ids"])) for row in rows]),
        }

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(self.lengths)

    def describe(self, max_length: int) -> dict[str, Any]:
        """Counts for the run's record: rows, packs, tokens, and the share of the packs' room that tokens fill."""
        return {
            "rows": len(self.lengths),
            "packs": len(self.packs),
            "tokens": self.tokens,
            "fill": round(self.tokens / max(1, len(self.packs) * max_length), 4),
        }


@dataclass(frozen=True)
class PackCollator:
    """Packs padded on the right to the longest of them.

    No attention mask is made. Padding comes after the last row of its pack, with positions that count on from it, so no
    token of a row can see it, and its label is never supervised.
    """

    pad_token_id: int
    flat: bool = False
    """Whether packs stand end to end in one row without padding, the only form in which flash-attention keeps to the
    borders that positions give."""

    def __call__(self, packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `labels`, `position_ids`: int64 tensors of shape (B, L), or (1, tokens) if `flat`.
        """
        if self.flat:
            return {name: torch.from_numpy(np.concatenate([pack[name] for pack in packs]))[None] for name in packs[0]}
        longest = max(len(pack["input_ids"]) for pack in packs)
        shape = (len(packs), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for row, pack in enumerate(packs):
            length = len(pack["input_ids"])
            input_ids[row, :length] = torch.from_numpy(pack["input_ids"])
            labels[row, :length] = torch.from_numpy(pack["labels"])
            position_ids[row, :length] = torch.from_numpy(pack["position_ids"])
            position_ids[row, length:] = position_ids[row, length - 1] + 1 + torch.arange(longest - length)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


class GlobalBatchSampler(Sampler[int]):
    """The order of packs in each epoch: shuffled by seed and epoch alone, filled up to whole global batches.

    Which packs a global step sees does not depend on how it is split over processes and accumulation steps. The last
    global batch of an epoch is filled with `FILLER`, so that no pack is dropped or seen twice.
    """

    def __init__(self, size: int, *, global_batch: int, seed: int) -> None:
        """
        Args:
            size: packs in the data set.
            global_batch: packs per optimizer step: micro-batch rows x accumulation steps x processes.
            seed: with the epoch's number, what the order depends on.
        """
        self.size = size
        self.global_batch = global_batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next; Accelerate's data loader calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
        yield from order
        yield from [FILLER] * (len(self) - self.size)
