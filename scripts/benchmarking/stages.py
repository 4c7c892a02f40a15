"""Where the time of preparing rows goes, and how it grows with the length of a conversation.

    shares(tokenizer, config)                    # {"read": 0.9, "tokenize": 9.8, ...}: CPU seconds of each stage
    by_turns(tokenizer, (25, 50, 100, 200))      # {25: 0.002, ...}: CPU seconds a conversation

The stages run one after the other here, so that each can be told apart; in a run they overlap.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig
from src.accounting import Tally
from src.cache import ShardWriter, load_rows
from src.formats import Conversation, row_converter
from src.packing import PackedRows
from src.preparation import BATCH_ROWS, content_hash
from src.sources import open_source
from src.token_bytes import TokenBytes
from src.tokenization import RowEncoder

T = TypeVar("T")

REPEATS = 3
"""Times that each length is measured; the least counts."""


@dataclass
class Stages:
    """CPU seconds by stage, those of the tokenizer's threads among them; `latest` are those of the last batch, with
    the stages within it."""

    seconds: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)

    def run(self, stage: str, work: Callable[[], T], *, without: Sequence[str] = ()) -> T:
        """What `work` returns; its time is the stage's, less the time of a batch's stages `without` within it."""
        started = time.process_time()
        found = work()
        spent = time.process_time() - started
        self.latest[stage] = spent
        own = spent - sum(self.latest[name] for name in without)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + own
        return found


def shares(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> dict[str, float]:
    """CPU seconds of each stage of preparing conversations from the only source of `config`."""
    stages = Stages()
    [source] = config.train
    found = open_source(source, "data.train.0")
    convert = row_converter(found, source.format)
    encoder = stages.run("look at the tokenizer", lambda: RowEncoder.of(tokenizer, config.supervise))
    table = stages.run("look at the tokenizer", lambda: TokenBytes.of(encoder.backend))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        writer, given = ShardWriter(folder), iter(found)
        while read := stages.run("read", lambda: list(itertools.islice(given, BATCH_ROWS))):
            _batch(stages, read, convert.checked, encoder, table, writer, config)
        stages.run("write", lambda: writer.close({}))
        written = load_rows([folder], "train")
        stages.run("pack", lambda: PackedRows.of(written, config))
    return {stage: round(seconds, 3) for stage, seconds in stages.seconds.items()}


def _batch(
    stages: Stages,
    read: Sequence[Any],
    convert: Callable[[Any], Any],
    encoder: RowEncoder,
    table: TokenBytes,
    writer: ShardWriter,
    config: DataConfig,
) -> None:
    samples = stages.run("convert and check", lambda: [convert(row) for row in read])
    stages.run("hash", lambda: [content_hash(sample) for sample in samples])
    texts = stages.run("render", lambda: encoder.template.render(samples))
    stages.run("find turns", lambda: encoder.finder.find(samples), without=("render",))
    encoded = stages.run("tokenize", lambda: encoder.backend.encode_batch_fast(texts, add_special_tokens=False))
    ids = stages.run("take the ids", lambda: [encoding.ids for encoding in encoded])
    stages.run("prove the bytes", lambda: table.place(texts, ids))
    made = stages.run(
        "label and check",
        lambda: encoder.encode_conversations(samples),
        without=("find turns", "tokenize", "take the ids", "prove the bytes"),
    )
    kept = stages.run("account", lambda: Tally().keep(made, config))
    stages.run("write", lambda: writer.write("train", kept))


def by_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[int]) -> dict[int, float]:
    """CPU seconds to encode a conversation of so many turns, each of its own text, in rows of one shape."""
    encoder = RowEncoder.of(tokenizer)
    found = {}
    for count in turns:
        rows = [_long(count, number) for number in range(10)]
        encoder.encode_conversations(rows[:1])  # learns the shape
        spent = []
        for _ in range(REPEATS):
            started = time.process_time()
            encoder.encode_conversations(rows)
            spent.append((time.process_time() - started) / len(rows))
        found[count] = round(min(spent), 6)
    return found


def _long(turns: int, number: int) -> Conversation:
    text = "Natalia sold clips to 48 of her friends in April, and then half as many in May; how many is that, and why?"
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": f"{turn}.{number}: {text}"} for turn in range(turns)
    ]
    return Conversation(tuple(messages), f"row {number}")
