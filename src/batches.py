"""The micro-batches of a run: an order that the seed and the settings alone decide, and each process's share of it.

    split = StepSplit(tokens=8192, accumulation_steps=2, processes=4, process=0)
    feed = PackFeed(PackedRows.of(data.train, config.data), split, seed=42, epochs=2.0)
    feed.go_to(step=100)
    for packs in feed:                       # this process's micro-batches from there on: lists of packs
        batch = collator(packs)
    feed.mark.chain                          # stands for all rows of the steps that were taken, in their order

The micro-batches of an epoch stand in one order for all processes. A step takes as many after one another as it has in
all, and process r of W takes the r-th of every W. So a step learns the same however it is split over processes and
accumulation steps. A chain of hashes over the rows of all processes tells two orders apart, and no two such splits.
"""

import bisect
import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch.utils.data import IterableDataset
from transformers.training_args import TrainingArguments

from src.packing import FILLER, PackedRows
from utils.ahead import Halt
from utils.hash_chain import START, extended

SORTED_TOGETHER = 32
"""Micro-batches' worth of packs that are sorted by length together, though never more than a quarter of all. The more
they are, the less padding is left (of 8192 tokens with rows of GSM8K and GPTeacher, 0.10 at 8 and 0.03 at 32), and the
less new company a pack gets in the next epoch."""

Item = TypeVar("Item")
Packs = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class StepSplit:
    """What a micro-batch holds, and how an optimizer step is split into micro-batches.

    A micro-batch has `rows` packs; or where `tokens` is not None, as many packs as make at most `tokens` tokens once
    each is padded to the longest of them.
    """

    rows: int = 1
    tokens: int | None = None
    accumulation_steps: int = 1
    processes: int = 1
    process: int = 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, of all processes together."""
        return self.processes * self.accumulation_steps

    def share(self, step: Sequence[Item]) -> Sequence[Item]:
        """Those of a step's micro-batches that this process takes."""
        return step[self.process :: self.processes]


def split_of(args: TrainingArguments, tokens: int | None = None) -> StepSplit:
    """The split that Trainer's settings say, for this process.

    Args:
        tokens: most tokens of a micro-batch, padding included. None: the settings count its packs.
    """
    return StepSplit(
        rows=args.per_device_train_batch_size,
        tokens=tokens,
        accumulation_steps=args.gradient_accumulation_steps,
        processes=args.world_size,
        process=args.process_index,
    )


def micro_batches(lengths: np.ndarray, split: StepSplit, random: np.random.Generator) -> list[list[int]]:
    """Group packs into micro-batches, in a random order.

    With a limit of tokens, packs are shuffled, sorted by length within windows of SORTED_TOGETHER micro-batches, and
    cut where the limit is reached; then the micro-batches are shuffled.

    Args:
        lengths: tokens per pack, of at least one pack; with a limit of tokens, each is at most that.
    Returns:
        Lists of indices into `lengths`; every index appears exactly once.
    """
    order = random.permutation(len(lengths))
    if split.tokens is None:
        return [order[start : start + split.rows].tolist() for start in range(0, len(order), split.rows)]
    assert lengths.max() <= split.tokens, "a pack is longer than a micro-batch may be"
    window = math.ceil(len(lengths) * min(SORTED_TOGETHER * split.tokens / lengths.sum(), 1 / 4))
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        first = 0
        while first < len(part):
            end = first + split.tokens // int(lengths[part[first]])  # the first is the longest of its micro-batch
            batches.append(part[first:end].tolist())
            first = end
    return [batches[index] for index in random.permutation(len(batches))]


@dataclass(frozen=True)
class PackMark:
    """Where a feed stands: the steps that were taken, and the chain of their rows."""

    step: int = 0
    chain: str = START


class PackFeed(IterableDataset):
    """The packs of a data set, epoch after epoch, each in an order of its own.

    The last step of an epoch is filled with micro-batches of `FILLER`, so that no pack is left out or seen twice.
    """

    def __init__(
        self, packs: PackedRows, split: StepSplit, *, seed: int, epochs: float = 1.0, max_steps: int | None = None
    ) -> None:
        """
        Args:
            seed: with the epoch's number, what the order depends on.
            epochs: passes over the packs; `max_steps` overrides it.
            max_steps: optimizer steps. None: as many as `epochs` needs.
        """
        self.packs = packs
        self.split = split
        self.seed = seed
        self._ends: list[int] = []  # the steps at which epochs end
        self.mark = PackMark()
        whole, part = divmod(epochs, 1)
        last = math.ceil(round(part * self._steps_of(int(whole)), 6))
        self.steps = max_steps or sum(map(self._steps_of, range(int(whole)))) + last

    def __len__(self) -> int:
        """Micro-batches of this process in the whole run."""
        return self.steps * self.split.accumulation_steps

    def go_to(self, step: int) -> None:
        """Choose the step, from 0, that is fed next."""
        if step != self.mark.step:
            self.mark = PackMark(step, self.chain_at(step))

    def chain_at(self, step: int, since: PackMark | None = None) -> str:
        """The chain once so many steps are taken, of which none is fed for that.

        Args:
            since: where the chain is known, and from where on rows have this feed's order. None: the start.
        """
        since = since or PackMark()
        chain = since.chain
        for packs in itertools.islice(self.steps_from(since.step), step - since.step):
            chain = self._extended(chain, packs)
        return chain

    def epoch_at(self, step: int) -> float:
        """Epochs that are done once so many steps are, with the share of the one that goes on."""
        epoch = self._epoch_of(step)
        start = self._ends[epoch - 1] if epoch else 0
        return epoch + (step - start) / (self._ends[epoch] - start)

    def stand_at(self, mark: PackMark) -> None:
        """Note the steps that were taken."""
        self.mark = mark

    def steps_left(self) -> int:
        """Steps from where the feed stands to the end of the run."""
        return max(0, self.steps - self.mark.step)

    def __iter__(self) -> Iterator[Packs]:
        for micro_batches, _ in self.marked_steps():
            yield from micro_batches

    def marked_steps(self, halt: Halt | None = None) -> Generator[tuple[list[Packs], PackMark], None, None]:
        """This process's micro-batches, step by step from where the feed stands, without end.

        Args:
            halt: not needed, as no step takes long to make.
        Returns:
            A step's micro-batches, and the mark that `stand_at` takes once they train.
        """
        mark = self.mark
        for batches in self.steps_from(mark.step):
            mark = PackMark(mark.step + 1, self._extended(mark.chain, batches))
            yield [[self.packs[index] for index in batch] for batch in self.split.share(batches)], mark

    def steps_from(self, step: int) -> Generator[list[list[int]], None, None]:
        """The micro-batches of all processes together, each a list of packs' indices, step by step without end."""
        epoch = self._epoch_of(step)
        done = step - (self._ends[epoch - 1] if epoch else 0)
        while True:
            batches = self.epoch(epoch)
            for first in range(done * self.split.micro_batches, len(batches), self.split.micro_batches):
                yield batches[first : first + self.split.micro_batches]
            epoch, done = epoch + 1, 0

    def _extended(self, chain: str, batches: Sequence[Sequence[int]]) -> str:
        """The chain after a step: which rows share a pack, their places in the table, and their tokens."""
        packs = [self.packs.packs[index] for batch in batches for index in batch if index != FILLER]
        rows = np.fromiter(itertools.chain.from_iterable(packs), dtype=np.int64)
        sizes = np.fromiter(map(len, packs), dtype=np.int64, count=len(packs))
        return extended(chain, sizes, rows, self.packs.lengths[rows])

    def epoch(self, number: int) -> list[list[int]]:
        """The micro-batches of an epoch, of all processes together, each a list of packs' indices."""
        batches = micro_batches(self.packs.pack_tokens, self.split, np.random.default_rng([self.seed, number]))
        return batches + [[FILLER]] * (-len(batches) % self.split.micro_batches)

    def packs_of(self, step: int) -> list[list[int]]:
        """The packs' indices of this process's micro-batches in a step, counted from 1."""
        epoch = self._epoch_of(step - 1)
        first = (step - 1 - (self._ends[epoch - 1] if epoch else 0)) * self.split.micro_batches
        return list(self.split.share(self.epoch(epoch)[first : first + self.split.micro_batches]))

    def _epoch_of(self, step: int) -> int:
        """The epoch that a step, counted from 0, belongs to."""
        while not self._ends or self._ends[-1] <= step:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._steps_of(len(self._ends)))
        return bisect.bisect_right(self._ends, step)

    def _steps_of(self, epoch: int) -> int:
        if self.split.tokens is not None:
            return len(self.epoch(epoch)) // self.split.micro_batches
        return -(-len(self.packs) // (self.split.rows * self.split.micro_batches))
