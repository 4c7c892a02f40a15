"""Losses that stand out: planted ones are found with their rows, and noise is none."""

import json

import numpy as np
import pytest
from datasets import Dataset

from src.spikes import FEWEST, MOST, RECENT, SpikeFinder
from tests.test_bad_numbers import build, step_of_row
from tests.test_trainer import tiny_model


def spikes_in(losses, tokens=1000):
    finder = SpikeFinder()
    return [place for place, loss in enumerate(losses) if finder.add(float(loss), tokens)]


@pytest.mark.parametrize("noise", ["normal", "lognormal"])
def test_noise_is_no_spike(noise):
    random = np.random.default_rng(0).standard_normal(5000)
    assert spikes_in(2 + 0.2 * random if noise == "normal" else np.exp(0.5 * random)) == []


def test_a_falling_loss_is_none_and_one_that_rises_for_good_is_told_where_it_does():
    steps, random = np.arange(1000), np.random.default_rng(1)
    falling = (8 * np.exp(-steps / 100) + 1) * np.exp(0.05 * random.standard_normal(1000))
    assert spikes_in(falling) == []
    risen = np.where(steps < 500, 1.0, 4.0) * np.exp(0.05 * random.standard_normal(1000))
    found = spikes_in(risen)
    assert found[0] == 500
    assert found[-1] < 500 + RECENT


def test_steps_of_a_harder_source_are_none_once_they_are_known():
    random = np.random.default_rng(5)
    losses = np.where(random.random(2000) < 0.1, 3.0, 1.5) + 0.1 * random.standard_normal(2000)
    assert 0 < len(spikes_in(losses)) <= MOST


def test_a_planted_loss_is_found_unless_too_little_came_before_or_its_batch_is_small():
    losses = 2 + 0.1 * np.random.default_rng(2).standard_normal(200)
    losses[[FEWEST - 1, 150]] = 4.0, 4.5
    assert spikes_in(losses) == [150]
    finder = SpikeFinder()
    for loss in losses[:150]:
        finder.add(loss, 1000)
    # ln(4.5 / 2) = 0.81 is 16 deviations of 5 %, and 3.6 of what a twentieth of the tokens has by chance.
    assert finder.add(4.5, 50) is None


def test_a_finder_that_goes_on_finds_what_one_that_was_never_stopped_does():
    losses = 2 + 0.1 * np.random.default_rng(3).standard_normal(100)
    losses[80] = 5.0
    whole, first, second = SpikeFinder(), SpikeFinder(), SpikeFinder()
    for loss in losses[:60]:
        whole.add(loss, 10), first.add(loss, 10)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [whole.add(loss, 10) for loss in losses[60:]] == [second.add(loss, 10) for loss in losses[60:]]


def rows_that_count(count, garbage):
    """Rows that count upwards, of which one is noise."""
    random = np.random.default_rng(4)
    starts = random.integers(3, 40, size=count)
    ids = [list(range(start, start + 8)) for start in starts.tolist()]
    ids[garbage] = random.integers(3, 60, size=8).tolist()
    labels = [[-100, *row[1:]] for row in ids]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": labels, "origin": [f"rows.jsonl line {n}" for n in range(count)]}
    )


def test_a_row_of_noise_among_rows_that_were_learned_is_told_by_name(tmp_path):
    order = build(tmp_path / "order", tiny_model(), rows_that_count(240, 0), steps=60, packing=False)
    garbage = next(row for row in range(240) if step_of_row(order, row) == 50)
    rows = rows_that_count(240, garbage)
    trainer = build(tmp_path, tiny_model(), rows, steps=60, packing=False, training={"log_every_steps": 20})
    trainer.train()
    found = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in found] == [(50, "spike")]
    assert found[0]["rows"][0]["row"] == f"rows.jsonl line {garbage}"
    assert found[0]["rows"][0]["loss"] > 2 * found[0]["rows"][1]["loss"]
    assert found[0]["of_rows"] == 4
    assert found[0]["loss"] > 1.5 * found[0]["usual"]
