"""What is counted and timed while a contender trains.

clock = Clock(started=time.time())
clock.start()
for batch in batches:
    ...
    clock.mark()
clock.seconds()  # between the ends of steps
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from src.loss import next_token_targets
from src.packing import IGNORED
from utils.metrics import peak_memory


@dataclass(frozen=True)
class BatchCounts:
    """What one micro-batch holds."""

    tokens: int
    supervised: int
    positions: int
    """Tokens and padding."""
    pairs: int
    """Of a token and one that it sees: itself and those before it in its document."""

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor], pad_token_id: int) -> "BatchCounts":
        """
        Args:
            batch: `input_ids`, `labels` (B, L), and either `position_ids`, which start at 0 with each document, or
                none, where each row is one document.
        """
        ids_BL = batch["input_ids"].numpy()
        real_BL = ids_BL != pad_token_id
        positions_BL = batch.get("position_ids")
        if positions_BL is None:
            positions_BL = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)
        # A token at place p of its document sees p + 1 tokens.
        pairs = int((np.asarray(positions_BL)[real_BL] + 1).sum())
        supervised = int((next_token_targets(batch["labels"]) != IGNORED).sum())
        return cls(int(real_BL.sum()), supervised, ids_BL.size, pairs)


@dataclass
class CountingCollator:
    """A trainer's own collator, with an account of what it made, in order."""

    collator: Any
    pad_token_id: int
    counts: list[BatchCounts] = field(default_factory=list)

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        self.counts.append(BatchCounts.of(batch, self.pad_token_id))
        return batch


class Clock:
    """When each optimizer step ended on the device; only the first makes it wait. Loading and logging count as well."""

    def __init__(self, *, started: float) -> None:
        """
        Args:
            started: when the process was started, in seconds of `time.time`.
        """
        self._started = started
        self._aside = 0.0
        self._marks: list[Any] = []
        self.first_step_s = 0.0
        """Seconds from the start of the process to the end of the first step."""

    def leave_out(self, seconds: float) -> None:
        """Take time that no contender is to answer for from that to the first step."""
        self._aside += seconds

    def start(self) -> None:
        """Forget the memory that was held before."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def mark(self) -> None:
        """A step has been given to the device."""
        if not self._marks:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.first_step_s = time.time() - self._started - self._aside
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds from the end of each step to that of the next: one fewer than steps."""
        if not torch.cuda.is_available():
            return [after - before for before, after in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._marks)]


class StepMarks(TrainerCallback):
    """A trainer's steps, on a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.mark()


def peak_memory_mib() -> int:
    """Most memory in use while training: what torch held on the GPU, or the resident size of this process."""
    found = peak_memory()
    return found.get("cuda_mib", found["resident_mib"])
