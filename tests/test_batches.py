"""Micro-batches hold every pack once, keep to their limit, and do not depend on how a step is split."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset

from src.batches import PackFeed, StepSplit, micro_batches
from src.packing import FILLER, PackedRows
from tests.tiny_run import assert_same_run, metrics_of, run_train, stop_after, two_epochs, weights_of


def packs_of(*lengths):
    rows = [list(range(index * 100, index * 100 + length)) for index, length in enumerate(lengths)]
    return PackedRows(Dataset.from_dict({"input_ids": rows, "labels": rows}), max_length=64, packing=False)


def many_packs(count=100, seed=0):
    return packs_of(*np.random.default_rng(seed).integers(2, 33, size=count).tolist())


def numbers(batches):
    """The rows of micro-batches, by the number that is in their ids; -1 for a filler."""
    return [[int(pack["input_ids"][0]) // 100 if len(pack["input_ids"]) > 1 else -1 for pack in b] for b in batches]


def padded_tokens(lengths, batches):
    return [len(batch) * max(lengths[index] for index in batch) for batch in batches]


def test_packs_of_like_length_share_micro_batches_up_to_the_limit():
    # Each quarter of the shuffled packs, the longest first, is cut where one pack more would make above 18 tokens.
    lengths = np.array([3, 9, 5, 2, 8, 4, 3, 5, 2, 1])
    assert np.random.default_rng(5).permutation(lengths).tolist() == [5, 3, 9, 2, 5, 8, 3, 1, 4, 2]
    batches = micro_batches(lengths, StepSplit(tokens=18), np.random.default_rng(5))
    assert sorted(lengths[batch].tolist() for batch in batches) == [[2], [2], [3], [4, 3, 1], [8, 5], [9, 5]]


def test_no_micro_batch_exceeds_its_tokens_and_every_pack_stands_once():
    lengths = np.random.default_rng(1).integers(1, 513, size=5000)
    for tokens in (512, 4096):
        batches = micro_batches(lengths, StepSplit(tokens=tokens), np.random.default_rng(2))
        assert sorted(index for batch in batches for index in batch) == list(range(5000))
        assert max(padded_tokens(lengths, batches)) <= tokens
        # A window's 32 micro-batches part lengths of 1 to 512, so a row lacks about 8 of 256 tokens to its longest.
        assert sum(padded_tokens(lengths, batches)) / lengths.sum() < 1.04
        unsorted = micro_batches(lengths, StepSplit(rows=tokens // 256), np.random.default_rng(2))
        assert sum(padded_tokens(lengths, unsorted)) / lengths.sum() > 1.3


def test_micro_batches_of_rows_keep_the_order_and_leave_the_padding():
    lengths = np.random.default_rng(1).integers(1, 513, size=50)
    batches = micro_batches(lengths, StepSplit(rows=4), np.random.default_rng(2))
    assert [len(batch) for batch in batches] == [4] * 12 + [2]
    assert [index for batch in batches for index in batch] == np.random.default_rng(2).permutation(50).tolist()


@pytest.mark.parametrize("limit", [{"rows": 3}, {"tokens": 64}])
def test_processes_together_take_each_step_of_one_process_alone(limit):
    packs = many_packs()
    alone = PackFeed(packs, StepSplit(**limit, accumulation_steps=4), seed=3, epochs=2)
    for processes in (2, 4):
        splits = [
            StepSplit(**limit, accumulation_steps=4 // processes, processes=processes, process=process)
            for process in range(processes)
        ]
        feeds = [PackFeed(packs, split, seed=3, epochs=2) for split in splits]
        assert {feed.steps for feed in feeds} == {alone.steps}
        assert {len(feed) for feed in feeds} == {len(alone) // processes}
        taken = [numbers(islice(feed, len(feed))) for feed in feeds]
        together = [batch for each in zip(*taken, strict=True) for batch in each]
        assert together == numbers(islice(alone, len(alone)))


@pytest.mark.parametrize("limit", [{"rows": 3}, {"tokens": 64}])
def test_an_epoch_holds_every_pack_once_and_ends_with_the_fillers(limit):
    packs = many_packs(97)
    for split in (StepSplit(**limit, accumulation_steps=8), StepSplit(**limit, accumulation_steps=2, processes=4)):
        feed = PackFeed(packs, split, seed=0, epochs=3)
        for epoch in range(3):
            batches = feed.epoch(epoch)
            assert len(batches) % 8 == 0
            assert sorted(index for batch in batches for index in batch if index != FILLER) == list(range(97))
            filled = [batch == [FILLER] for batch in batches]
            assert filled == sorted(filled)
            assert sum(filled) < 8


def test_each_epoch_has_an_order_of_its_own_that_the_seed_fixes():
    for split in (StepSplit(rows=2), StepSplit(tokens=64)):
        feed, again, other = (PackFeed(many_packs(), split, seed=seed) for seed in (7, 7, 8))
        assert feed.epoch(0) == again.epoch(0) != other.epoch(0)
        groups = [{frozenset(batch) for batch in feed.epoch(epoch)} for epoch in (0, 1)]
        assert len(groups[0] & groups[1]) < len(groups[0]) / 2, "packs meet others in the next epoch"


def test_a_feed_goes_on_from_any_step_of_epochs_that_differ_in_length():
    feed = PackFeed(many_packs(), StepSplit(tokens=48, accumulation_steps=2), seed=1, epochs=4)
    counts = [len(feed.epoch(epoch)) // 2 for epoch in range(4)]
    assert len(set(counts)) > 1, "the case needs epochs of unlike length"
    assert feed.steps == sum(counts)
    whole = numbers(islice(feed, len(feed)))
    for step in range(feed.steps):
        resumed = PackFeed(feed.packs, feed.split, seed=1, epochs=4)
        resumed.go_to(step)
        assert numbers(islice(resumed, len(feed) - 2 * step)) == whole[2 * step :]


def test_epochs_are_counted_in_the_steps_of_each():
    feed = PackFeed(many_packs(), StepSplit(tokens=48), seed=1, epochs=2.5)
    first, second, third = (len(feed.epoch(epoch)) for epoch in range(3))
    assert feed.steps == first + second + -(-third // 2)
    assert feed.epoch_at(0) == 0
    assert feed.epoch_at(first) == 1
    assert feed.epoch_at(first + 3) == 1 + 3 / second
    assert feed.epoch_at(first + second) == 2
    assert PackFeed(many_packs(10), StepSplit(), seed=1, epochs=1.1).steps == 11
    assert PackFeed(many_packs(10), StepSplit(), seed=1, max_steps=3, epochs=9.0).steps == 3


def test_a_run_resumed_in_either_epoch_ends_as_one_never_stopped(tmp_path):
    budget = {"micro_batch_rows": None, "tokens_per_micro_batch": 256, "save_every_steps": 1}
    recipe = two_epochs(tmp_path, "full", data={"packing": False}, training=budget)
    run, whole = tmp_path / "outputs" / "run", tmp_path / "whole"
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert lines[-1]["epoch"] == 2.0
    steps = json.loads((run / "result.json").read_text())["steps"]
    assert steps >= 4
    shutil.copytree(run, whole)
    for step in (steps - 1, 1):
        stop_after(run, step)
        done = run_train("--config", recipe, "--resume")
        assert done.code == 0, done.stderr
        assert f"step {step + 1}/{steps}  loss" in done.stderr
        assert_same_run(run, whole)
    # The comparison sees another order of the rows.
    done = run_train("--config", recipe, "--output.name", "other", "--training.seed", "1")
    assert done.code == 0, done.stderr
    weights, others = weights_of(tmp_path / "outputs" / "other" / "model"), weights_of(whole / "model")
    assert any(not np.array_equal(weights[name], others[name]) for name in weights)
