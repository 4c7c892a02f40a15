"""The optimizer steps of a run, made ready while the step before trains: collated, pinned and counted.

steps = ReadySteps(feed, collator, meter.count, device=args.device, pins=True)
for step in steps:                       # from where the feed stands
    feed.stand_at(step.mark)             # so that its state is that of the step which trains
    ...
steps.close()
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from src.batches import PackFeed, Packs
from src.streaming import StreamFeed
from utils.ahead import Ahead, Halt
from utils.metrics import Counted

STEPS_AHEAD = 2
"""Steps that are made before they are asked for: one, and a second for the step that takes longer to make than to
train, such as one of long packs after one of short ones."""

Batch = dict[str, torch.Tensor | int]


@dataclass(frozen=True)
class ReadyStep:
    """The micro-batches of this process in one optimizer step, on the host."""

    batches: list[Batch]
    counted: list[Counted]
    """What is in each."""

    counts: torch.Tensor
    """int64, (2,): supervised tokens, and tokens, of this process in the step; pinned as the batches are."""

    mark: Any
    """Where the feed stands after the step."""


class ReadySteps(IterableDataset):
    """The steps of a feed as torch's `DataLoader` takes them, each whole. One iteration at a time."""

    def __init__(
        self,
        feed: PackFeed | StreamFeed,
        collate: Callable[[Packs], Batch],
        count: Callable[[Mapping[str, torch.Tensor]], Counted],
        *,
        device: torch.device,
        pins: bool,
    ) -> None:
        """
        Args:
            count: tells what is in a micro-batch.
            device: what the batches are for.
            pins: whether they are put where a GPU can fetch them while the process goes on.
        """
        self.feed = feed
        self.collate = collate
        self.count = count
        self.device = device
        self.pins = pins
        self._ahead: Ahead[ReadyStep] | None = None

    def __len__(self) -> int:
        """Micro-batches, which is what Trainer counts steps in."""
        return len(self.feed)

    def __iter__(self) -> Iterator[ReadyStep]:
        self.close()
        halt = Halt()
        self._ahead = Ahead(self._steps(halt), halt, most=STEPS_AHEAD)
        return self._ahead

    def close(self) -> None:
        """Stop making steps."""
        if self._ahead is not None:
            self._ahead.close()

    def _steps(self, halt: Halt) -> Generator[ReadyStep, None, None]:
        if self.pins:
            torch.cuda.set_device(self.device)  # else pinning, in this thread, would take memory of the first GPU
        with contextlib.closing(self.feed.marked_steps(halt)) as fed:
            for micro_batches, mark in islice(fed, self.feed.steps_left()):
                yield self._ready(micro_batches, mark)

    def _ready(self, micro_batches: list[Packs], mark: Any) -> ReadyStep:
        batches = [self.collate(packs) for packs in micro_batches]
        counted = [self.count(batch) for batch in batches]
        sums = [sum(one.supervised for one in counted), sum(one.tokens for one in counted)]
        counts = torch.tensor(sums, dtype=torch.int64)
        if self.pins:
            counts, batches = counts.pin_memory(), [_pinned(batch) for batch in batches]
        return ReadyStep(batches, counted, counts, mark)


class FeedPlace(TrainerCallback):
    """Starts the feed at the number of steps taken, which a resumed run knows exactly, and keeps the state's epoch.

    The feed is one long epoch to Trainer, which cannot know that epochs differ in their number of steps.
    """

    def __init__(self, feed: Callable[[], PackFeed | StreamFeed]) -> None:
        """
        Args:
            feed: tells the run's feed, which is made when training begins.
        """
        self.feed = feed

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go to where the run stands."""
        self.feed().go_to(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the epoch as the feed counts it."""
        state.epoch = self.feed().epoch_at(state.global_step)


def _pinned(batch: Batch) -> Batch:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
