"""Rows that cannot be trained on exactly: each is left out with its place, the kind of its defect and the cause.

    raise RowRefusedError(Refusal("rows.jsonl line 7", "content_lost", "the chat template leaves out message 2 ..."))

Where rows are handled in batches, a refusal stands in the list at the row's own place, and the others go on.
"""

from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError

Kind = Literal[
    "malformed", "masked", "untrained_stop", "doubled_bos", "missing_bos", "role_order", "content_lost", "unaligned"
]
"""What is wrong with a row, by the name of the check of `data.contract` that counts it.

`malformed`: it is not what its format says; `masked`: nothing in it would be trained; `untrained_stop`: no stop token
ends a turn; `doubled_bos`, `missing_bos`: BOS does not stand exactly once at the start; `role_order`: the template
refuses or leaves out a message because of its role or place; `content_lost`: the template leaves out a part of a
message, or the tools; `unaligned`: the template's output does not show where a turn is.
"""


@dataclass(frozen=True)
class Refusal:
    """A row that is left out; `reason` is a sentence that says what was found and what to change."""

    origin: str
    kind: Kind
    reason: str


class RowRefusedError(UserError):
    """Carries a refusal from where it is found to where the row is left out."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal
