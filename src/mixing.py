"""Which rows of which source stand in one pass over the training rows.

    order = mixed_order([7000, 500], config.train, seed=42)   # positions in the sources' rows, one after the other
    table = table.select(order)

Without weights each source gives all its rows, `epochs` times over, one source after the other.

With weights, w of a source over the sum of all is its share of the rows of a pass (rows as they are trained: a
conversation, or a piece of a text). The pass ends where the first source has given its rows `epochs` times over, so no
source gives a row more often than that: with r rows each, the pass has min(r * epochs / share) rows. A source that
gives fewer than it has gives a choice of them by `seed`, the same in every pass; one that gives more than it has gives
each row once before any a second time. The rows of all sources stand in one order by `seed`.
"""

from collections.abc import Sequence

import numpy

from config.schema import SourceConfig
from utils.errors import UserError


def rows_of_a_pass(rows: Sequence[int], sources: Sequence[SourceConfig]) -> list[int]:
    """How many rows each source gives in one pass.

    Args:
        rows: those that each source has, in the order of `sources`.
    Raises:
        UserError: a weight is so low that its source would give no row.
    """
    most = [count * source.epochs for count, source in zip(rows, sources, strict=True)]
    if any(source.weight is None for source in sources):
        return most
    total = sum(source.weight for source in sources)
    whole = min(count * total / source.weight for count, source in zip(most, sources, strict=True))
    given = [min(count, round(whole * source.weight / total)) for count, source in zip(most, sources, strict=True)]
    for index, source in enumerate(sources):
        if given[index] == 0:
            raise UserError(
                f"data.train.{index}.weight={source.weight} of {total:g} in all gives no row of {source.path} to a "
                f"pass of {int(whole)} rows, of which it has {rows[index]}; raise it, or the epochs of the smallest "
                "source"
            )
    return given


def rows_of_a_window(weights: Sequence[float], window: int, rows: int) -> list[int]:
    """How many rows each source gives to a window of a stream.

    After any number of windows each source has given its share of all rows, to the nearest whole row.

    Args:
        window: its number, from 0.
        rows: in a window, of all sources together.
    """
    shares = [weight / sum(weights) for weight in weights]
    return [round(share * rows * (window + 1)) - round(share * rows * window) for share in shares]


def mixed_order(rows: Sequence[int], sources: Sequence[SourceConfig], seed: int) -> numpy.ndarray:
    """The positions that make one pass, counted through the rows of all sources, one source after the other.

    Returns:
        int64, one position a row of the pass.
    Raises:
        UserError: a weight is so low that its source would give no row.
    """
    given = rows_of_a_pass(rows, sources)
    weighted = all(source.weight is not None for source in sources)
    parts, start = [], 0
    for index, (count, wanted) in enumerate(zip(rows, given, strict=True)):
        # RandomState, unlike Generator, gives the same numbers in every release of numpy.
        chosen = numpy.random.RandomState([seed, index]).permutation(count) if weighted else numpy.arange(count)
        parts.append(start + numpy.resize(chosen, wanted).astype(numpy.int64))
        start += count
    order = numpy.concatenate(parts)
    return numpy.random.RandomState([seed, len(rows)]).permutation(order) if weighted else order
