"""Which rows each optimizer step takes: packs in one order for all who train on packs, and the same rows padded.

layout = Layout.of(case, rows)
packs = layout.packs_table()    # for trainers that take packs: input_ids, labels, seq_lengths
rows = layout.rows_table()      # for trainers that pad: input_ids, labels
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from scripts.benchmarking.case import Case
from src.batches import StepSplit, micro_batches
from src.packing import PackedRows
from utils.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The packs of a case in the order in which the project's own trainer feeds them."""

    case: Case
    packs: PackedRows
    order: list[int]
    """Indices of packs, those of the first micro-batch first."""

    @classmethod
    def of(cls, case: Case, rows: Dataset) -> "Layout":
        """
        Raises:
            UserError: there are fewer packs than the steps need.
        """
        packs = PackedRows(rows, max_length=case.max_length, packing=True)
        split = StepSplit(rows=case.micro_batch_rows, accumulation_steps=case.accumulation_steps)
        batches = micro_batches(packs.pack_tokens, split, np.random.default_rng([case.seed, 0]))
        order = [pack for batch in batches for pack in batch][: case.packs_needed]
        if len(order) < case.packs_needed:
            raise UserError(
                f"{case.all_steps} steps need {case.packs_needed} packs and the rows make {len(order)}; give less "
                "--steps, --accumulation_steps or --micro_batch_rows"
            )
        return cls(case, packs, order)

    def _rows_of(self, packs: list[int]) -> list[int]:
        return [row for pack in packs for row in self.packs.packs[pack]]

    @property
    def rows_of_first_step(self) -> int:
        """Rows in the packs of the first step."""
        return len(self._rows_of(self.order[: self.case.micro_batch_rows * self.case.accumulation_steps]))

    @property
    def padded_rows(self) -> int:
        """Rows that are padded together: unless the case says, as many as never take more positions than packs."""
        if self.case.padded_rows:
            return self.case.padded_rows
        longest = int(self.packs.lengths[self._rows_of(self.order)].max())
        return self.case.micro_batch_rows * self.case.max_length // longest

    @property
    def padded_accumulation_steps(self) -> int:
        """Padded micro-batches to a step, so that a step has about the tokens of a packed one."""
        return max(1, len(self._rows_of(self.order)) // (self.case.all_steps * self.padded_rows))

    def packs_table(self) -> Dataset:
        """Packs in order: `input_ids`, `labels`, and `seq_lengths`, the tokens of each row in the pack."""
        items = [self.packs[index] for index in self.order]
        names = {"input_ids": "input_ids", "labels": "labels", "seq_lengths": "lengths"}
        return Dataset.from_dict({name: [item[own].tolist() for item in items] for name, own in names.items()})

    def rows_table(self) -> Dataset:
        """The rows of the packs, in order: `input_ids` and `labels`."""
        return self.packs.rows.with_format(None).select(self._rows_of(self.order))
