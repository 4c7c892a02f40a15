"""Packs hold every row once, keep to their capacity, and batches carry the borders of rows."""

import time

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from src.loss import supervised_places
from src.packing import FILLER, IGNORED, PackCollator, PackedRows, best_fit_bins


def rows_of(*lengths):
    return Dataset.from_dict(
        {
            "input_ids": [[10 * row + token for token in range(length)] for row, length in enumerate(lengths)],
            "labels": [
                [IGNORED] + [10 * row + token for token in range(1, length)] for row, length in enumerate(lengths)
            ],
        }
    )


def test_best_fit_matches_a_hand_worked_case():
    # 7 takes a pack; 5 opens another; 4 does not fit beside 7 (3 left), fits beside 5 (5 left); 3 fills the first.
    assert best_fit_bins([5, 3, 7, 4, 1], capacity=10) == [[2, 1], [0, 3, 4]]


def test_a_pack_ends_with_the_rows_that_fill_it():
    # Best-fit decreasing alone needs three packs: 6 + 5, 4 + 4 + 3, and 2.
    packs = best_fit_bins([6, 5, 4, 4, 3, 2], capacity=12)
    assert packs == [[0, 2, 5], [1, 3, 4]]
    assert best_fit_bins([3, 8, 3], capacity=14) == [[1, 0, 2]]
    assert best_fit_bins([3, 8, 2], capacity=14) == [[1, 0, 2]]


def test_best_fit_keeps_every_row_once_and_the_capacity():
    lengths = np.random.default_rng(0).integers(1, 129, size=3000).tolist()
    packs = best_fit_bins(lengths, capacity=512)
    assert sorted(index for pack in packs for index in pack) == list(range(3000))
    assert max(sum(lengths[index] for index in pack) for pack in packs) <= 512
    assert len(packs) <= 1.01 * sum(lengths) / 512 + 1


@pytest.mark.parametrize("length", [0, 11])
def test_best_fit_refuses_a_row_that_no_pack_takes(length):
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens; a pack takes 1 to 10"):
        best_fit_bins([3, length], capacity=10)


def test_a_pack_restarts_positions_and_never_supervises_a_first_token():
    pack = PackedRows(rows_of(3, 4), max_length=8, packing=True)[0]
    assert pack["input_ids"].tolist() == [10, 11, 12, 13, 0, 1, 2]
    assert pack["labels"].tolist() == [IGNORED, 11, 12, 13, IGNORED, 1, 2]
    batch = PackCollator(pad_token_id=99)([pack])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["document_borders"].tolist() == [0, 4, 7]


def test_without_packing_each_row_is_its_own_pack_in_the_rows_order():
    packed = PackedRows(rows_of(3, 4, 2), max_length=8, packing=False)
    assert [len(packed[index]["input_ids"]) for index in range(len(packed))] == [3, 4, 2]
    told = {"0": 2, "10": 2, "50": 3, "90": 4, "99": 4, "100": 4}
    assert packed.describe(8) == {"rows": 3, "packs": 3, "tokens": 9, "fill": 0.375, "length_percentiles": told}


def test_padding_opens_no_new_document_and_is_never_supervised():
    packed = PackedRows(rows_of(3, 4, 2), max_length=7, packing=True)
    batch = PackCollator(pad_token_id=99)([packed[0], packed[1]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 0, 1, 2], [20, 21, 99, 99, 99, 99, 99]]
    assert batch["position_ids"][1].tolist() == list(range(7))
    assert (batch["labels"][1, 2:] == IGNORED).all()
    assert batch["document_borders"].tolist() == [0, 4, 7, 14]
    assert batch["row_tokens"].tolist() == [7, 2]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "document_borders": torch.int32,
        "supervised_places": torch.int64,
        "row_tokens": torch.int64,
    }
    assert batch["supervised_places"].equal(supervised_places(batch["labels"]))


def test_a_flat_batch_has_no_padding_and_all_borders():
    packed = PackedRows(rows_of(3, 4, 2), max_length=7, packing=True)
    batch = PackCollator(pad_token_id=99, flat=True)([packed[0], packed[FILLER], packed[1]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 0, 1, 2, 0, 20, 21]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0, 1]]
    assert batch["document_borders"].tolist() == [0, 4, 7, 8, 10]


def test_rows_of_several_tables_and_of_a_choice_are_packed_alike():
    whole = rows_of(3, 4, 2, 5)
    parted = concatenate_datasets([whole.select(range(2)), whole.select(range(2, 4))])
    chosen = concatenate_datasets([whole, whole]).select([4, 1, 6, 3])
    packs = [PackedRows(rows, max_length=7, packing=True) for rows in (whole, parted, chosen)]
    for index in range(len(packs[0])):
        batches = [PackCollator(0)([packed[index]]) for packed in packs]
        assert all(torch.equal(batches[0][name], batch[name]) for batch in batches[1:] for name in batch)


@pytest.mark.slow
def test_a_million_rows_are_packed_in_seconds_with_next_to_no_room_left():
    lengths = np.random.default_rng(0).lognormal(np.log(200), 0.8, 1_000_000).astype(int).clip(8, 2048)
    started = time.process_time()
    packs = best_fit_bins(lengths, capacity=2048)
    assert time.process_time() - started < 5
    assert lengths.sum() / (2048 * len(packs)) >= 0.999
