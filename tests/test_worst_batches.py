"""The worst micro-batches of a run, against those that its own feed and collator make."""

import numpy as np
import pytest
from datasets import Dataset

from src.batches import PackFeed, StepSplit
from src.packing import IGNORED, PackCollator, PackedRows
from src.worst_batches import KINDS, supervised_counts, worst_evaluation, worst_of_run


def rows_of(lengths, seed=0):
    """Rows of so many tokens, a random share of which is supervised; the first of a row never is."""
    random = np.random.default_rng(seed)
    labels = [[IGNORED, *np.where(random.random(length - 1) < random.random(), 7, IGNORED)] for length in lengths]
    return Dataset.from_dict({"input_ids": [[7] * length for length in lengths], "labels": labels})


LENGTHS = [int(length) for length in np.random.default_rng(1).integers(2, 60, 67)]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("packing", "split", "more"),
    [
        (True, StepSplit(rows=3, accumulation_steps=2), {"epochs": 2.5}),
        (False, StepSplit(rows=4, processes=2, process=1), {"epochs": 3.0}),
        (False, StepSplit(tokens=128, accumulation_steps=3), {"max_steps": 7}),
    ],
    ids=["packed", "rows", "tokens"],
)
def test_the_worst_micro_batches_are_those_of_all_that_every_process_is_fed(packing, split, more, flat):
    packs = PackedRows(rows_of(LENGTHS), max_length=64, packing=packing)
    fed = []
    for process in range(split.processes):
        own = StepSplit(split.rows, split.tokens, split.accumulation_steps, split.processes, process)
        feed = PackFeed(packs, own, seed=3, **more)
        steps = [step for step, _ in zip((step for step, _ in feed.marked_steps()), range(feed.steps), strict=False)]
        fed += [batch for step in steps for batch in step]
    collate = PackCollator(0, flat=flat, tells_longest=True)
    # As the collator counts them. A row's first label is none of a token's to predict, here as there.
    counted = [(batch["input_ids"].numel(), int((batch["labels"] != IGNORED).sum())) for batch in map(collate, fed)]
    longest = [max(int(max(pack["lengths"])) for pack in batch) for batch in fed]

    found = worst_of_run(PackFeed(packs, split, seed=3, **more), flat=flat)
    assert found.tokens == sum(tokens for tokens, _ in counted)
    assert found.worst[KINDS[0]].tokens == max(tokens for tokens, _ in counted)
    assert found.worst[KINDS[1]].supervised == max(supervised for _, supervised in counted)
    assert found.worst[KINDS[2]].longest == max(longest) == max(LENGTHS)
    for kind in KINDS:  # what is told of a micro-batch is true of what is fed
        batch = collate(found.fed[kind])
        assert found.worst[kind].tokens == batch["input_ids"].numel()
        assert found.worst[kind].supervised == int((batch["labels"] != IGNORED).sum())


def test_supervised_tokens_are_counted_in_rows_that_stand_in_another_order():
    rows = rows_of(LENGTHS).select([5, 2, 2, 40, 0])  # an indirection, as mixed sources have
    counted = supervised_counts(PackedRows(rows, max_length=64, packing=False))
    assert counted.tolist() == [sum(label != IGNORED for label in row["labels"]) for row in rows]


def test_the_worst_evaluation_batches_are_found_among_those_that_come_in_order():
    packs = PackedRows(rows_of([5, 9, 3, 30, 8, 2, 4]), max_length=64, packing=False)
    indices, tokens, all_tokens = worst_evaluation(packs, rows=3)
    assert {3, 4, 5} <= set(indices)
    assert all_tokens == 3 * 9 + 3 * 30 + 1 * 4
    assert tokens >= 90
