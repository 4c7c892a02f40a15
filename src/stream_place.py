"""Where a stream of rows stands, and by what a resumed run knows that it reads the same rows again.

rows = ChainedRows(source)
list(itertools.islice(rows, place.rows_read[0]))
assert rows.chain == place.chains[0]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.accounting import Tally
from src.sources import Row
from utils.hash_chain import START, extended

TokenArrays = tuple[np.ndarray, np.ndarray]
"""A row's ids and labels, each int32."""


@dataclass(frozen=True)
class Place:
    """Where a stream stands before a window: what is known of all windows before it.

    `rows_read` counts what each source has given in this epoch, and `chains` stand for the content of these rows;
    `tallies` are the counts of the first epoch's rows.
    """

    epoch: int
    window: int
    rows_read: tuple[int, ...]
    tallies: tuple[Tally, ...]
    left_over: tuple[TokenArrays, ...] = ()
    chains: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """The place as plain JSON."""
        return {
            "epoch": self.epoch,
            "window": self.window,
            "rows_read": list(self.rows_read),
            "tallies": [tally.as_json() for tally in self.tallies],
            "left_over": [[array.tolist() for array in row] for row in self.left_over],
            "chains": self.chains,
        }

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "Place":
        """The place that `as_json` told."""
        rows = (tuple(np.array(part, dtype=np.int32) for part in row) for row in content["left_over"])
        return cls(
            content["epoch"],
            content["window"],
            tuple(content["rows_read"]),
            tuple(Tally.of_json(tally) for tally in content["tallies"]),
            tuple(rows),
            tuple(content["chains"]) if content.get("chains") else None,  # an older checkpoint has none
        )


class ChainedRows(Iterator[Row]):
    """Rows, with the chain of the content of those that were read."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.chain = START
        self._rows = rows

    def __next__(self) -> Row:
        row = next(self._rows)
        self.chain = extended(self.chain, np.frombuffer(repr(row.values).encode(errors="replace"), dtype=np.uint8))
        return row
