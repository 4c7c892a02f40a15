"""Which rows of a data set are shown.

sides = sides_of(data)                         # {"train": Dataset, "eval": Dataset}, without a side that is empty
longest_rows(sides["train"], count=3)          # [812, 17, 4031]
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from src.data import TokenizedData
from src.packing import row_lengths
from src.view import RowViewer, ViewedRow
from utils.errors import UserError


@dataclass(frozen=True)
class ShownRow:
    """A row with its place: `number` counts the rows of a side from 0, `origin` says where it was read."""

    side: str
    number: int
    origin: str
    view: ViewedRow


@dataclass(frozen=True)
class Choice:
    """Rows to show of each side: the one of number `row`, `sample` of them by chance, or else `rows` of them.

    `longest` takes the longest rows instead of the first. None of `sides` has no rows.
    """

    sides: dict[str, Dataset]
    rows: int
    row: int | None = None
    sample: int | None = None
    longest: bool = False
    seed: int = 0

    def numbers(self) -> dict[str, list[int]]:
        """The chosen rows of each side.

        Raises:
            UserError: there is no row of that number.
        """
        if self.row is not None:
            side, table = next(iter(self.sides.items()))
            if self.row >= len(table):
                raise UserError(f"--row {self.row} is beyond the {side} rows, which are 0 to {len(table) - 1}")
            return {side: [self.row]}
        if self.sample is not None:
            return {side: sampled_rows(len(table), self.sample, self.seed) for side, table in self.sides.items()}
        if self.longest:
            return {side: longest_rows(table, self.rows) for side, table in self.sides.items()}
        return {side: list(range(min(self.rows, len(table)))) for side, table in self.sides.items()}

    def shown(self, viewer: RowViewer) -> Iterator[ShownRow]:
        """The chosen rows, one after the other.

        Raises:
            UserError: there is no row of that number.
        """
        for side, numbers in self.numbers().items():
            for number in numbers:
                row = self.sides[side][number]
                yield ShownRow(side, number, row["origin"], viewer.view(row["input_ids"], row["labels"]))


def sides_of(data: TokenizedData, side: str | None = None) -> dict[str, Dataset]:
    """The rows of both sides, or of one.

    Raises:
        UserError: the side that is asked for has no rows.
    """
    tables = {name: table for name, table in (("train", data.train), ("eval", data.eval)) if table is not None}
    if side is None:
        return tables
    if side not in tables:
        raise UserError(f"--side {side}: the recipe has no {side} rows; give data.{side}, or leave out --side")
    return {side: tables[side]}


def longest_rows(table: Dataset, count: int) -> list[int]:
    """The numbers of the rows with most tokens, the longest first; of equal ones, the one that comes first."""
    return np.argsort(-row_lengths(table), kind="stable")[:count].tolist()


def sampled_rows(rows: int, count: int, seed: int) -> list[int]:
    """Numbers of `count` different rows, or of all if there are fewer, in order; the same for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count]).tolist()
