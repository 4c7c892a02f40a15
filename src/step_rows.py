"""The rows of a step that was taken, by name, and what each costs: to say which of them made its numbers go bad.

    steps = RecentSteps(feed, collate)
    steps.keep(7, batches)                        # of a stream, which cannot be read again at once
    for batch in steps.of(7):                     # this process's micro-batches
        nll_D, tokens_D = row_losses(batch, score)
        batch.names[0]                            # "train.jsonl line 12"

Shapes: D documents in a micro-batch, in its order; T supervised tokens.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from src.batches import PackFeed
from src.loss import Scored
from src.packing import FILLER, IGNORED, PackCollator
from src.steps import Batch
from src.streaming import StreamFeed

STREAM_STEPS = 64
"""Newest steps of a stream whose batches are kept: of 65,536 tokens a step, 24 bytes each, 100 MiB of host memory."""

STREAMED = "a streamed row"
"""The name of rows whose place in their source is not kept."""


@dataclass(frozen=True)
class NamedBatch:
    """A micro-batch on the host, and the place in its source of each of its documents that trains."""

    batch: Batch
    names: list[str]

    def documents(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of each document, with any padding after it."""
        borders = self.batch["document_borders"].tolist()
        ids, labels = self.batch["input_ids"].flatten(), self.batch["labels"].flatten()
        return [(ids[start:end], labels[start:end]) for start, end in itertools.pairwise(borders)]

    def supervised(self) -> torch.Tensor:
        """The document of each supervised token, int64, (T,)."""
        borders = self.batch["document_borders"][1:].long()
        return torch.searchsorted(borders, self.batch["supervised_places"], right=True)

    def alone(self, document: int, collate: PackCollator) -> "NamedBatch":
        """A micro-batch of one of its documents."""
        ids, labels = (part.numpy() for part in self.documents()[document])
        pack = {"input_ids": ids, "labels": labels, "lengths": np.array([len(ids)])}
        return NamedBatch(collate([pack]), [self.names[document]])


class RecentSteps:
    """Makes the micro-batches of steps again that this process has taken."""

    def __init__(self, feed: PackFeed | StreamFeed, collate: PackCollator) -> None:
        self.feed = feed
        self.collate = collate
        self._kept: deque[tuple[int, Sequence[Batch]]] = deque(maxlen=STREAM_STEPS)

    def keep(self, step: int, batches: Sequence[Batch]) -> None:
        """Note the batches of the step that is about to be taken, counted from 1; nothing where they can be remade."""
        if isinstance(self.feed, StreamFeed):
            self._kept.append((step, batches))

    def of(self, step: int) -> list[NamedBatch]:
        """The micro-batches of a step, counted from 1; none where they are not known any more."""
        if isinstance(self.feed, PackFeed):
            return [self._named(packs) for packs in self.feed.packs_of(step)]
        kept = next((batches for number, batches in self._kept if number == step), ())
        return [NamedBatch(batch, [STREAMED] * (len(batch["document_borders"]) - 1)) for batch in kept]

    def _named(self, packs: Sequence[int]) -> NamedBatch:
        names = [name for pack in packs for name in ([""] if pack == FILLER else self.feed.packs.origins(pack))]
        return NamedBatch(self.collate([self.feed.packs[pack] for pack in packs]), names)


def row_losses(batch: NamedBatch, score: Callable[[Batch], Scored]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood (D,), float64, and supervised tokens (D,), int64, of a batch's documents.

    Args:
        score: scores a batch of the host, with what its caller wants of dropout and gradients.
    """
    nll_T = score(batch.batch).nll.double().cpu()
    document_T, documents = batch.supervised(), len(batch.names)
    tokens_D = torch.bincount(document_T, minlength=documents)
    return torch.zeros(documents, dtype=torch.float64).index_add_(0, document_T, nll_T), tokens_D


def excerpt(ids: torch.Tensor, labels: torch.Tensor, decode: Callable[[list[int]], str], length: int = 80) -> str:
    """The start of a document's supervised text, by which it is found in its source."""
    text = " ".join(decode(ids[labels != IGNORED].tolist()[: 2 * length]).split())
    return text if len(text) <= length else f"{text[:length]}..."
