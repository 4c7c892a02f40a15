"""Token rows that look like instruction data in what costs time: lengths, supervised share, and frequencies of tokens.

lengths, supervised = row_lengths(case, count=1000)
rows = synthetic_rows(case, vocabulary=512, count=1000)
"""

import numpy as np
from datasets import Dataset

from scripts.benchmarking.case import Case
from src.packing import IGNORED

SIGMA = 0.8
"""Standard deviation of the logarithm of a row's length."""

FIRST_ID = 3
"""Token ids below are the tokenizer's special ones, which no row holds."""


def row_lengths(case: Case, count: int) -> np.ndarray:
    """Tokens a row, int64 (count,): log-normal, redrawn where below 8 or above `case.max_length`.

    The first n lengths are the same for every count above n.
    """
    generator = np.random.default_rng([case.seed, 0])
    lengths: list[int] = []
    while len(lengths) < count:
        length = int(case.median_length * np.exp(SIGMA * generator.standard_normal()))
        if 8 <= length <= case.max_length:
            lengths.append(length)
    return np.array(lengths)


def rows_needed(case: Case) -> int:
    """Rows for all steps of a case without a second epoch."""
    batches = (case.warmup_steps + case.steps) * case.micro_batch_rows * case.accumulation_steps
    if not (case.packing and case.trainer == "smolfactory"):
        return batches
    sample = row_lengths(case, 1000)
    return int(1.1 * batches * case.max_length / sample.mean()) + 8  # a tenth more, so that no step is part empty


def rows_per_pack(case: Case) -> float:
    """Rows that a full pack holds on average."""
    return case.max_length / row_lengths(case, 1000).mean()


def synthetic_rows(case: Case, vocabulary: int, count: int) -> Dataset:
    """Rows with columns `input_ids` and `labels`, the same for the same case.

    The end of each row is supervised, a share of 0.2 to 0.8 of its tokens. Token frequencies fall as 1 / rank, so that
    there is something to learn: the loss falls from about log(vocabulary).
    """
    lengths = row_lengths(case, count)
    generator = np.random.default_rng([case.seed, 1])
    ids, labels = [], []
    for length in lengths:
        ranks = np.exp(generator.random(length) * np.log(vocabulary - FIRST_ID)).astype(np.int32) - 1
        row = (ranks + FIRST_ID).astype(np.int32)
        first = max(1, int(length * generator.uniform(0.2, 0.8)))
        ids.append(row)
        labels.append(np.concatenate([np.full(first, IGNORED, dtype=np.int32), row[first:]]))
    return Dataset.from_dict({"input_ids": ids, "labels": labels})
