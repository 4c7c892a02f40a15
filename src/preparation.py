"""Rows of a source -> token rows on disk, batch by batch, so that memory does not grow with the data.

    preparation = Preparation(config, encoder, folder)
    for source in sources:                       # evaluation sources first
        preparation.write(source)                # folder/source-000/shard-000000/, ...

While one batch is rendered and tokenized in the background, the next is read and the last is written.
"""

import hashlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from config.schema import DataConfig
from src.accounting import LeftOut, Tally, write_left_out
from src.cache import ShardWriter, read_account, shard_name
from src.formats import Conversation, IdsRow, RowConverter, Sample, TextRow, require_assistant_turns
from src.pretokenized import checked_ids
from src.refusal import Refusal, RowRefusedError
from src.sources import Row, SourceRows
from src.tokenization import RowEncoder, TokenRow
from utils.files import whole_folder
from utils.hash_set import HashSet

BATCH_ROWS = 500
"""Rows that are rendered and tokenized at once."""

SHARD_ROWS = 20_000
"""Rows read for one shard: what a killed process loses at most."""

CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))

AT_WORK = 2
"""Batches that are tokenized at the same time, one in Rust's threads and one in Python."""


@dataclass(frozen=True)
class OpenSource:
    """A source with its converter; `index` counts all sources, those of evaluation first; `side` is what it is for."""

    found: SourceRows
    convert: RowConverter
    index: int
    side: str

    @property
    def is_chat(self) -> bool:
        """Whether the rows are conversations."""
        return self.convert.format not in ("text", "tokenized")


@dataclass(frozen=True)
class Batch:
    """Rows with the side that each is on, and what is known of them before they are tokenized."""

    rows_read: int
    rows: list[Sample]
    sides: dict[str, str]
    hashes: np.ndarray
    tallies: dict[str, Tally]


def content_hash(row: Sample) -> str:
    """The SHA-256 of a row's content as canonical JSON: the same for equal rows, wherever they were read."""
    if isinstance(row, Conversation):
        content: Any = {"messages": list(row.messages), "tools": list(row.tools)}
    else:
        content = row.text if isinstance(row, TextRow) else list(row.input_ids)
    return hashlib.sha256(CANONICAL.encode(content).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class Preparation:
    """What is known across sources: the hashes of rows that were seen, each the first 64 bits of its content's.

    `shard_rows` are the rows read for one shard, a multiple of BATCH_ROWS.
    """

    config: DataConfig
    encoder: RowEncoder
    folder: Path
    shard_rows: int = SHARD_ROWS
    held_out: HashSet = field(default_factory=HashSet)
    seen: HashSet = field(default_factory=HashSet)

    def write(self, source: OpenSource) -> None:
        """Write the shards of a source that are not there yet.

        Raises:
            UserError: a row is not right, or the template does not allow exact supervision of it; it names the row.
        """
        shard = 0
        while (account := read_account(self._place(source, shard))) is not None:
            self._remember(source, np.load(self._place(source, shard) / "hashes.npy"))
            if account["rows_read"] < self.shard_rows:
                return
            shard += 1
        rows = itertools.islice(source.found, shard * self.shard_rows, None)
        per_shard = self.shard_rows // BATCH_ROWS
        with self._executor() as executor:
            encoded = self._encoded(self._batches(source, rows), executor)
            rows_read = self.shard_rows
            while rows_read == self.shard_rows:
                with whole_folder(self._place(source, shard)) as place:
                    rows_read = self._write_shard(place, itertools.islice(encoded, per_shard))
                shard += 1

    def _place(self, source: OpenSource, shard: int) -> Path:
        return self.folder / shard_name(source.index, shard)

    def _executor(self) -> Executor:
        workers = self.config.workers
        if workers in (None, 1):
            return ThreadPoolExecutor(AT_WORK)
        # Spawned, as a fork of a process whose tokenizer has started threads can hang.
        return ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (self.encoder, self._text_length()))

    def _text_length(self) -> int:
        """Tokens after which a text is split."""
        return self.config.max_length if self.config.too_long in ("auto", "split") else sys.maxsize

    def _batches(self, source: OpenSource, rows: Iterator[Row]) -> Iterator[Batch]:
        while read := list(itertools.islice(rows, BATCH_ROWS)):
            samples = [source.convert(row) for row in read]
            if source.is_chat and self.config.supervise == "assistant":
                require_assistant_turns(samples, source.found.path)
            yield self._sorted(source, samples)

    def _sorted(self, source: OpenSource, samples: list[Sample]) -> Batch:
        """The rows of a batch on their sides; training rows that are evaluated on are left out and counted."""
        hashes = np.array([int(content_hash(sample)[:16], 16) for sample in samples], dtype=np.uint64)
        evaluated = self.held_out.contains(hashes) if source.side == "train" else np.zeros(len(hashes), dtype=bool)
        known = self._remember(source, hashes)
        limit = 0 if self.config.eval else self.config.eval_fraction * 16**16
        tallies = {"train": Tally(), "eval": Tally()}
        kept, sides = [], {}
        for sample, number, is_evaluated, is_known in zip(samples, hashes.tolist(), evaluated, known, strict=True):
            side = "eval" if source.side == "eval" or number < limit else "train"
            tally = tallies[side]
            if is_evaluated:
                tally.note("in_train_and_eval", sample.origin)
                tally.left_out.append(LeftOut(sample.origin, "in train and eval"))
                continue
            tally.rows += 1
            if is_known:
                tally.note("duplicated", sample.origin)
            if isinstance(sample, Conversation) and sample.has_empty_answer():
                tally.note("empty_answers", sample.origin)
            if isinstance(sample, IdsRow) and sample.first_label_dropped:
                tally.note("first_labels", sample.origin)
            kept.append(sample)
            sides[sample.origin] = side
        return Batch(len(samples), kept, sides, hashes, tallies)

    def _remember(self, source: OpenSource, hashes: np.ndarray) -> np.ndarray:
        """Take in the hashes of rows, and say which were there."""
        if source.side == "eval":
            self.held_out.add(hashes)
        return self.seen.add(hashes)

    def _encoded(self, batches: Iterator[Batch], executor: Executor) -> Iterator[tuple[Batch, list[TokenRow]]]:
        """Each batch with its token rows, in order; a few are under way while the caller works on one."""
        encode: Callable[[list[Sample]], Future[list[TokenRow]]]
        if isinstance(executor, ProcessPoolExecutor):
            encode = lambda rows: executor.submit(_encode_in_worker, rows)  # noqa: E731
        else:
            encode = lambda rows: executor.submit(_encode, rows, self.encoder, self._text_length())  # noqa: E731
        under_way: deque[tuple[Batch, Future[list[TokenRow]]]] = deque()
        for batch in batches:
            under_way.append((batch, encode(batch.rows)))
            if len(under_way) > max(AT_WORK, self.config.workers or 1):
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()

    def _write_shard(self, folder: Path, encoded: Iterator[tuple[Batch, list[TokenRow]]]) -> int:
        """Write a shard's files, and return how many rows of the source it stands for."""
        writer, tallies = ShardWriter(folder), {"train": Tally(), "eval": Tally()}
        rows_read, hashes = 0, [np.zeros(0, dtype=np.uint64)]
        with open(folder / "eval.jsonl", "w", encoding="utf-8") as conversations:
            for batch, token_rows in encoded:
                rows_read += batch.rows_read
                hashes.append(batch.hashes)
                for side, tally in batch.tallies.items():
                    own = [row for row in token_rows if batch.sides[row.origin] == side]
                    kept = tally.keep(own, self.config)
                    tallies[side].add(tally)
                    writer.write(side, kept)
                    write_left_out(folder, (replace(row, side=side) for row in tally.left_out))
                    if side == "eval":
                        measured = {row.origin for row in kept}
                        conversations.writelines(
                            json.dumps(asdict(sample)) + "\n" for sample in batch.rows if _is_answered(sample, measured)
                        )
        np.save(folder / "hashes.npy", np.concatenate(hashes))
        writer.close({"rows_read": rows_read, "tallies": {side: tally.as_json() for side, tally in tallies.items()}})
        return rows_read


def _is_answered(sample: Sample, measured: set[str]) -> bool:
    return isinstance(sample, Conversation) and sample.origin in measured and sample.ends_with_answer()


def read_conversations(shard: Path) -> list[Conversation]:
    """The evaluation conversations of a shard that end with an answer, in order."""
    with open(shard / "eval.jsonl", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [
        Conversation(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
        for content in found
    ]


def _encode(rows: Sequence[Sample], encoder: RowEncoder, text_length: int) -> list[TokenRow]:
    if not rows:
        return []
    if isinstance(rows[0], TextRow):
        return encoder.encode_texts(rows, text_length)
    if isinstance(rows[0], IdsRow):
        return checked_ids(rows, len(encoder.tokenizer))
    encoded = encoder.encode_conversations(rows)
    for row in encoded:
        if isinstance(row, Refusal):
            raise RowRefusedError(row)
    return encoded


_worker: tuple[RowEncoder, int] | None = None
"""What a worker process encodes with, sent to it once."""


def _start_worker(encoder: RowEncoder, text_length: int) -> None:
    global _worker
    _worker = encoder, text_length


def _encode_in_worker(rows: Sequence[Sample]) -> list[TokenRow]:
    assert _worker is not None
    return _encode(rows, *_worker)
