"""Token rows to train on: random ones that look like instruction data in what costs time, or real instructions.

rows = token_rows(case, data)          # columns input_ids and labels
lengths = row_lengths(case, count=1000)
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset

from config.benchmark import SHAPES
from scripts.benchmarking.case import Case
from src.packing import IGNORED
from utils.errors import UserError

SIGMA = 0.8
"""Standard deviation of the logarithm of a row's length."""

FIRST_ID = 3
"""Token ids below are the tokenizer's special ones, which no synthetic row holds."""

SPAN_PAIR = (40, 200)
"""Fewest and most tokens of a span that is not supervised and the supervised one after it, together."""


def token_rows(case: Case, data: Path) -> Dataset:
    """The rows of a case, with columns `input_ids` and `labels`; the same for the same case.

    Args:
        data: folder with the data sets and tokenizers, for real instructions.
    Raises:
        UserError: they are not there.
    """
    if case.rows == "instruction":
        rows = instruction_rows(case, data)
    else:
        rows = synthetic_rows(case, SHAPES[case.model]["vocab_size"], rows_needed(case))
    return rows if case.supervised is None else supervise_spans(rows, case.supervised, seed=case.seed)


def row_lengths(case: Case, count: int) -> np.ndarray:
    """Tokens a row, int64 (count,): log-normal, redrawn where below 8 or above `case.max_length`; of documents, that.

    The first n lengths are the same for every count above n.
    """
    if case.rows == "document":
        return np.full(count, case.max_length)
    generator = np.random.default_rng([case.seed, 0])
    lengths: list[int] = []
    while len(lengths) < count:
        length = int(case.median_length * np.exp(SIGMA * generator.standard_normal()))
        if 8 <= length <= case.max_length:
            lengths.append(length)
    return np.array(lengths)


def rows_needed(case: Case) -> int:
    """Synthetic rows for all steps of a case without a second epoch."""
    sample = row_lengths(case, 1000)
    return int(1.1 * case.packs_needed * case.max_length / sample.mean()) + 8  # a tenth more: no step is part empty


def synthetic_rows(case: Case, vocabulary: int, count: int) -> Dataset:
    """Rows of random tokens.

    The end of each row is supervised, a share of 0.2 to 0.8 of its tokens. Token frequencies fall as 1 / rank, so that
    there is something to learn: the loss falls from about log(vocabulary).
    """
    lengths = row_lengths(case, count)
    generator = np.random.default_rng([case.seed, 1])
    ids, labels = [], []
    for length in lengths:
        ranks = np.exp(generator.random(length) * np.log(vocabulary - FIRST_ID)).astype(np.int32) - 1
        row = (ranks + FIRST_ID).astype(np.int32)
        first = max(1, int(length * generator.uniform(0.2, 0.8)))
        ids.append(row)
        labels.append(np.concatenate([np.full(first, IGNORED, dtype=np.int32), row[first:]]))
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def write_instructions(data: Path, target: Path) -> None:
    """Write alpaca_en_demo as messages, a line each.

    Raises:
        UserError: the data set is not in `data`.
    """
    source = data / "datasets/llama_factory/alpaca_en_demo.json"
    if not source.is_file():
        raise UserError(f"--data={data} has no datasets/llama_factory/alpaca_en_demo.json; give the folder that has it")
    with open(target, "w", encoding="utf-8") as lines:
        for row in json.loads(source.read_text("utf-8")):
            question = "\n".join(filter(None, (row["instruction"], row["input"])))
            turns = (("user", question), ("assistant", row["output"]))
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")


def instruction_rows(case: Case, data: Path) -> Dataset:
    """alpaca_en_demo in Llama 2's tokens, with its answers supervised, rows above `max_length` cut."""
    from config.schema import DataConfig, SourceConfig
    from scripts.benchmarking.preparation import llama2_tokenizer
    from src.data import build_datasets

    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        file = Path(name) / "rows.jsonl"
        write_instructions(data, file)
        config = DataConfig(train=(SourceConfig(path=str(file)),), max_length=case.max_length, too_long="truncate")
        rows = build_datasets(config, llama2_tokenizer(data), cache_folder=Path(name) / "cache").train
        return Dataset.from_dict({column: rows[column][:] for column in ("input_ids", "labels")})


def supervise_spans(rows: Dataset, share: float, *, seed: int) -> Dataset:
    """The rows with other labels: a share of all tokens, in spans; in each row one at least, and never the first."""
    generator = np.random.default_rng([seed, 2])
    labels = []
    for ids in rows["input_ids"]:
        own = np.array(ids, dtype=np.int32)
        supervised = np.zeros(len(own), dtype=bool)
        pair = int(generator.integers(*SPAN_PAIR))
        place = -int(generator.integers(pair))  # begins anywhere in a pair, so that short rows have their share too
        while place < len(own):
            end = place + pair
            supervised[max(1, end - round(pair * share)) : max(1, end)] = True
            place, pair = end, int(generator.integers(*SPAN_PAIR))
        if not supervised.any():  # TRL would leave the row out
            supervised[-1] = True
        labels.append(np.where(supervised, own, IGNORED).astype(np.int32))
    return rows.remove_columns("labels").add_column("labels", labels)
