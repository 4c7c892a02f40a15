"""The rows on which what was merged is compared with what was trained.

rows = rows_to_compare(adapter, tokenizer, context=2048, file=Path("held_out.jsonl"))
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from config.schema import SourceConfig
from src.chat import ChatTemplate
from src.checkpoints.certificate import TEXTS
from src.formats import IdsRow, TextRow, row_converter
from src.sources import open_source
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

MOST_ROWS, ROW_TOKENS = 64, 128
LOGITS = 2**26
"""Most logits of an evaluation: 256 MiB in float32."""


@dataclass(frozen=True)
class Rows:
    """Token ids, and where they are from."""

    ids: tuple[tuple[int, ...], ...]
    origin: str

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.ids))


def rows_to_compare(
    tokenizer: PreTrainedTokenizerBase,
    eval_sources: Sequence[dict[str, Any]],
    *,
    vocab_size: int,
    context: int,
    file: Path | None = None,
) -> Rows:
    """The rows of a file; if none is given, the run's evaluation rows and fixed texts.

    Args:
        eval_sources: the run's `data.eval`.
        file: any that `data.train` takes: texts, conversations or ids.
    Raises:
        UserError: the file is missing or no format that is known, or the run's rows no longer are where they were.
    """
    limit = min(ROW_TOKENS, context)
    if file is not None:
        samples = _source_rows(SourceConfig(path=str(file)), "--rows", tokenizer)
        origin = str(file)
    else:
        samples = [tokenizer(text)["input_ids"] for text in TEXTS]
        origin = "fixed texts"
        for index, source in enumerate(eval_sources):
            try:
                found = _source_rows(SourceConfig(**source), f"data.eval.{index}", tokenizer)
            except UserError as error:
                log.warning("the run's evaluation rows are not compared: %s", error)
                continue
            samples, origin = [*found, *samples], "the run's evaluation rows and fixed texts"
    rows, left = [], LOGITS // vocab_size
    for row in samples:
        if row and len(rows) < MOST_ROWS and left > 1:
            rows.append(tuple(row[: min(limit, left)]))
            left -= len(rows[-1])
    if not rows:
        raise UserError(f"{origin} has no row with a token; give a file with at least one by --rows")
    return Rows(tuple(rows), origin)


def _source_rows(source: SourceConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    found = open_source(source, name)
    converter = row_converter(found, source.format)
    samples = [converter(row) for row in found.head[:MOST_ROWS]]
    return list(_token_ids(samples, tokenizer))


def _token_ids(samples: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    for sample in samples:
        if isinstance(sample, IdsRow):
            yield list(sample.input_ids)
        elif isinstance(sample, TextRow):
            yield tokenizer(sample.text, verbose=False)["input_ids"]
        else:
            text = ChatTemplate.of(tokenizer).render([sample])[0]
            yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
