"""The set of 64-bit hashes answers as Python's own, in a tenth of its memory."""

import random

import numpy as np

from utils.hash_set import HashSet


def test_it_answers_as_a_python_set_does():
    rng, seen, reference = random.Random(0), HashSet(), set()
    numbers = [0, 1, 2**63, 2**64 - 1, *(rng.getrandbits(64) for _ in range(3000))]
    for _ in range(300):
        batch = rng.choices(numbers, k=rng.choice([0, 1, 7, 40]))
        expected = [number in reference or number in batch[:place] for place, number in enumerate(batch)]
        assert seen.contains(np.array(batch, dtype=np.uint64)).tolist() == [number in reference for number in batch]
        assert seen.add(np.array(batch, dtype=np.uint64)).tolist() == expected
        reference.update(batch)
        assert len(seen) == len(reference)
    assert [number in seen for number in numbers] == [number in reference for number in numbers]
    assert len(reference) < len(set(numbers))  # some were never added


def test_a_million_hashes_take_8_bytes_each_in_few_arrays():
    seen, rng = HashSet(), np.random.default_rng(0)
    for _ in range(2000):
        seen.add(rng.integers(0, 2**64, 500, dtype=np.uint64))
    assert len(seen) == 1_000_000
    assert seen.nbytes == 8_000_000
    assert len(seen._sorted) <= 20
