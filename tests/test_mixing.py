"""Which rows stand in a pass: shares, ends, repeats and the seed."""

from collections import Counter

import pytest

from config.schema import SourceConfig
from src.mixing import mixed_order, rows_of_a_pass
from utils.errors import UserError


def sources(*weights, epochs=(1, 1, 1)):
    return [SourceConfig(path="x", weight=weight, epochs=n) for weight, n in zip(weights, epochs, strict=False)]


def test_without_weights_every_row_stands_in_order_as_often_as_told():
    assert mixed_order([3, 2], sources(None, None, epochs=(1, 2)), 0).tolist() == [0, 1, 2, 3, 4, 3, 4]


def test_a_pass_ends_where_the_first_source_has_given_its_rows():
    # shares 3/4 and 1/4: 100 rows of the first are 3/4 of 133.3, of which the second gives 33
    assert rows_of_a_pass([100, 1000], sources(3, 1)) == [100, 33]
    # twice over, the first gives 200 of 266.7
    assert rows_of_a_pass([100, 1000], sources(3, 1, epochs=(2, 1))) == [200, 67]
    # weights count by their share alone
    assert rows_of_a_pass([100, 1000], sources(0.75, 0.25)) == [100, 33]
    # the second runs out: 10 rows are 1/10 of 100
    assert rows_of_a_pass([1000, 10], sources(9, 1)) == [90, 10]


def test_no_row_stands_more_often_than_its_source_may():
    order = mixed_order([10, 500, 40], sources(1, 2, 1, epochs=(3, 1, 1)), 7)
    counts = Counter(order.tolist())
    assert all(counts[row] == 3 for row in range(10))
    assert max(counts[row] for row in range(10, 510)) == 1
    assert sum(counts[row] for row in range(10, 510)) == 60
    assert max(counts[row] for row in range(510, 550)) == 1
    assert sum(counts[row] for row in range(510, 550)) == 30


def test_the_seed_alone_decides_the_choice_and_the_order():
    first, again, other = (mixed_order([10, 500], sources(1, 1), seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first != sorted(first)
    assert {row for row in first if row >= 10} != {row for row in other if row >= 10}
    assert {row for row in first if row < 10} == set(range(10))


def test_a_weight_that_gives_no_row_is_an_error():
    with pytest.raises(UserError, match=r"data\.train\.1\.weight=0\.001 of 1\.001 in all gives no row .*raise it"):
        mixed_order([10, 10], sources(1, 0.001), 0)
