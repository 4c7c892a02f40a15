"""Tokens, supervised tokens and padding of every step of a run, counted before the first one.

    counts = count_steps(trainer.new_feed(), pad_id=0, flat=False)
    counts.tokens.sum()            # what metrics.jsonl will have as `tokens` in its last line

Nothing is estimated: the run's own feed gives the packs of each step, and what a pack holds is counted in its rows.
"""

from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from src.batches import PackFeed
from src.packing import FILLER, IGNORED, PackedRows

ROWS_AT_ONCE, STEPS_AT_ONCE = 10_000, 4096
"""Rows, and steps, that are counted together."""


@dataclass(frozen=True)
class StepCounts:
    """What each step holds, of all processes together: int64 arrays, (steps,)."""

    rows: np.ndarray
    packs: np.ndarray
    tokens: np.ndarray
    """Without padding."""
    supervised: np.ndarray
    positions: np.ndarray
    """With padding."""

    @property
    def padding(self) -> float:
        """Share of all positions that is padding."""
        return 1 - float(self.tokens.sum()) / max(1, int(self.positions.sum()))


def count_steps(feed: PackFeed, *, pad_id: int, flat: bool) -> StepCounts:
    """Count every step of a run from its first one on.

    Args:
        feed: of any process of the run; it stays where it stands.
        pad_id: the token that counts as none wherever it stands.
        flat: whether packs stand end to end, so that nothing is padded.
    """
    packs = feed.packs
    tokens_P, supervised_P = _counted(packs, pad_id)
    # FILLER's own stand last, as its index is -1.
    lengths_P, rows_P = np.append(packs.pack_tokens, 1), np.append([len(pack) for pack in packs.packs], 0)
    tokens_P, supervised_P = np.append(tokens_P, int(pad_id != 0)), np.append(supervised_P, 0)
    counted = []
    steps = islice(feed.steps_from(0), feed.steps)
    while some := list(islice(steps, STEPS_AT_ONCE)):
        indices = np.fromiter(chain.from_iterable(chain.from_iterable(some)), dtype=np.int64)
        sizes = np.array([len(batch) for batches in some for batch in batches])
        batch_starts = np.cumsum([0, *sizes[:-1]])
        lengths = lengths_P[indices]
        padded = np.add.reduceat(lengths, batch_starts) if flat else sizes * np.maximum.reduceat(lengths, batch_starts)
        in_step = np.cumsum([0, *(len(batches) for batches in some[:-1])])
        summed = (rows_P[indices], indices != FILLER, tokens_P[indices], supervised_P[indices])
        of_batches = [*(np.add.reduceat(values, batch_starts, dtype=np.int64) for values in summed), padded]
        counted.append([np.add.reduceat(values, in_step) for values in of_batches])
    return StepCounts(*(np.concatenate(parts) for parts in zip(*counted, strict=True)))


def _counted(packs: PackedRows, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are not padding's, and supervised ones, of every pack, int64, (packs,).

    The table is read once from its start to its end, in the order of its rows.
    """
    tokens_R, supervised_R = (np.zeros(len(packs.lengths), dtype=np.int64) for _ in range(2))
    done = 0
    for part in packs.rows.iter(batch_size=ROWS_AT_ONCE):
        count = len(part)
        starts = np.cumsum([0, *packs.lengths[done : done + count - 1]])
        for name, sums_R, nothing in (("input_ids", tokens_R, pad_id), ("labels", supervised_R, IGNORED)):
            values = part[name].combine_chunks().flatten().to_numpy()
            sums_R[done : done + count] = np.add.reduceat(values != nothing, starts, dtype=np.int64)
        done += count
    order = np.concatenate([np.asarray(pack, dtype=np.int64) for pack in packs.packs])
    starts = np.cumsum([0, *(len(pack) for pack in packs.packs[:-1])])
    return tuple(np.add.reduceat(sums_R[order], starts) for sums_R in (tokens_R, supervised_R))
