"""Rows that come tokenized: what can be checked of them without their text.

rows = checked_ids([IdsRow((1, 5, 2), (-100, 5, 2), "rows.parquet row 1")], vocabulary=32_000)
"""

from collections.abc import Sequence

from src.formats import IdsRow
from src.tokenization import TokenRow
from utils.errors import UserError


def checked_ids(rows: Sequence[IdsRow], vocabulary: int) -> list[TokenRow]:
    """Token rows of tokenized rows.

    Args:
        vocabulary: the number of ids that the tokenizer has.
    Raises:
        UserError: an id is negative or beyond the vocabulary; it names the row.
    """
    for row in rows:
        wrong = next((token for token in row.input_ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise UserError(
                f"{row.origin} has id {wrong}, and the tokenizer's are 0 to {vocabulary - 1}; the row was made with "
                "another tokenizer: give that one as model.tokenizer, or rows of text"
            )
    return [TokenRow(list(row.input_ids), list(row.labels), row.origin) for row in rows]
