"""Rows of a source -> token rows on disk, batch by batch, so that memory does not grow with the data.

    preparation = Preparation(config, encoder, folder)
    for source in sources:                       # evaluation sources first
        preparation.write(source)                # folder/source-000/shard-000000/, ...

While one batch is rendered and tokenized in the background, the next is read and the last is written.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from config.schema import DataConfig
from src.accounting import Tally, write_left_out
from src.cache import ShardWriter, read_account, shard_name
from src.formats import Conversation, IdsRow, RowConverter, Sample, TextRow
from src.pretokenized import IdsChecker
from src.refusal import Refusal
from src.sources import Row, SourceRows
from src.tokenization import RowEncoder, TokenRow
from utils.files import whole_folder
from utils.hash_set import HashSet

T = TypeVar("T")

BATCH_ROWS = 500
"""Rows that are rendered and tokenized at once."""

SHARD_ROWS = 20_000
"""Rows read for one shard: what a killed process loses at most."""

CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))

AT_WORK = max(2, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
"""Batches that are encoded at the same time: one of them in Python, while the others are in Rust."""

RUST_THREADS = "TOKENIZERS_PARALLELISM"
"""The environment variable that tells tokenizers whether to spread one batch over all cores."""


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


@dataclass(frozen=True)
class Work:
    """What the rows of a source are encoded with; `text_length` is that after which a text is split, in tokens."""

    encoder: RowEncoder
    text_length: int
    checker: IdsChecker | None


def content_hash(row: Sample) -> str:
    """The SHA-256 of a row's content as canonical JSON: the same for equal rows, wherever they were read.

    Raises:
        UnicodeEncodeError: a text holds half of a surrogate pair, which no text can.
    """
    if isinstance(row, Conversation):
        content: Any = {"messages": list(row.messages), "tools": list(row.tools)}
    else:
        content = row.text if isinstance(row, TextRow) else list(row.input_ids)
    return hashlib.sha256(CANONICAL.encode(content).encode()).hexdigest()


def _hashed(sample: Sample | Refusal) -> tuple[Sample | Refusal, int | None]:
    """A row with the first 64 bits of its content's hash; a refusal has none."""
    if isinstance(sample, Refusal):
        return sample, None
    try:
        return sample, int(content_hash(sample)[:16], 16)
    except UnicodeEncodeError as error:
        half = f"{error.object[error.start : error.end]!r}, half of a surrogate pair, which is no character"
        return Refusal(sample.origin, "malformed", f"{sample.origin} holds {half}; write the text as UTF-8 again"), None


@dataclass
class Preparation:
    """What is known across sources: the hashes of rows that were seen, each the first 64 bits of its content's.

    `shard_rows` are the rows read for one shard, a multiple of BATCH_ROWS. `finds_repeats` is whether rows that
    were seen are remembered.
    """

    config: DataConfig
    encoder: RowEncoder
    folder: Path
    shard_rows: int = SHARD_ROWS
    finds_repeats: bool = True
    held_out: HashSet = field(default_factory=HashSet)
    seen: HashSet = field(default_factory=HashSet)

    def write(self, source: OpenSource) -> None:
        """Write the shards of a source that are not there yet.

        Raises:
            UserError: a file cannot be read, or a row is written unlike a server would and the config makes that an
                error.
        """
        shard = 0
        while (account := read_account(self._place(source, shard))) is not None:
            self._remember(source, read_hashes(self._place(source, shard)))
            if account["rows_read"] < self.shard_rows:
                return
            shard += 1
        rows = itertools.islice(source.found, shard * self.shard_rows, None)
        per_shard = self.shard_rows // BATCH_ROWS
        with contextlib.closing(_older_objects_left_alone(self.encoded(source, rows))) as encoded:
            rows_read = self.shard_rows
            while rows_read == self.shard_rows:
                with whole_folder(self._place(source, shard)) as place:
                    rows_read = self._write_shard(place, itertools.islice(encoded, per_shard))
                    source.found.check_unchanged()
                shard += 1

    def encoded(self, source: OpenSource, rows: Iterator[Row]) -> Iterator[tuple[Batch, list[TokenRow | Refusal]]]:
        """Rows of a source in batches, each with its token rows, which are still to be kept or dropped.

        Raises:
            UserError: a file cannot be read.
        """
        work = self._work(source)
        with _a_thread_for_each_batch(), self._executor(work) as executor:
            yield from self._encoded(self._batches(source, rows), executor, work)

    def _place(self, source: OpenSource, shard: int) -> Path:
        return self.folder / shard_name(source.index, shard)

    def _executor(self, work: Work) -> Executor:
        workers = self.config.workers
        if workers in (None, 1):
            return ThreadPoolExecutor(AT_WORK)
        # Spawned, as a fork of a process whose tokenizer has started threads can hang.
        return ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (work,))

    def _work(self, source: OpenSource) -> Work:
        """What it takes to encode the rows of a source."""
        text_length = self.config.max_length if self.config.too_long in ("auto", "split") else sys.maxsize
        tokenized = source.convert.format == "tokenized"
        return Work(self.encoder, text_length, IdsChecker.of(self.encoder.tokenizer) if tokenized else None)

    def _batches(self, source: OpenSource, rows: Iterator[Row]) -> Iterator[Batch]:
        while read := list(itertools.islice(rows, BATCH_ROWS)):
            yield self._sorted(source, read)

    def _sorted(self, source: OpenSource, read: Sequence[Row]) -> Batch:
        """The rows of a batch on their sides; training rows that are evaluated on, and malformed ones, are left out."""
        limit = 0 if self.config.eval else self.config.eval_fraction * 16**16
        samples = [_hashed(source.convert.checked(row)) for row in read]
        hashes = np.array([number for _, number in samples if number is not None], dtype=np.uint64)
        evaluated = self.held_out.contains(hashes) if source.side == "train" else np.zeros(len(hashes), dtype=bool)
        met_before = zip(evaluated, self._remember(source, hashes), strict=True)
        batch = Batch(len(read), [], {}, hashes, {"train": Tally(), "eval": Tally()})
        for row, (sample, number) in zip(read, samples, strict=True):
            side = "eval" if source.side == "eval" or (number is not None and number < limit) else "train"
            tally = batch.tallies[side]
            if row.had_padded_tools():
                tally.defect("null_padded_tools", row.origin)
            if isinstance(sample, Refusal):
                tally.rows += 1
                tally.refuse(sample)
                continue
            is_evaluated, is_known = next(met_before)
            if is_evaluated:
                tally.leak(sample.origin)
                continue
            tally.rows += 1
            if is_known:
                tally.defect("duplicates", sample.origin)
            self._look_at(sample, tally)
            batch.rows.append(sample)
            batch.sides[sample.origin] = side
        return batch

    def _look_at(self, sample: Sample, tally: Tally) -> None:
        """Count what can be told of a row before it is tokenized."""
        if isinstance(sample, Conversation) and sample.has_empty_answer():
            tally.note("empty_answers", sample.origin)
        if isinstance(sample, IdsRow) and sample.first_label_dropped:
            tally.note("first_labels", sample.origin)

    def _remember(self, source: OpenSource, hashes: np.ndarray) -> np.ndarray:
        """Take in the hashes of rows, and say which were there."""
        if source.side == "eval":
            self.held_out.add(hashes)
        return self.seen.add(hashes) if self.finds_repeats else np.zeros(len(hashes), dtype=bool)

    def _encoded(
        self, batches: Iterator[Batch], executor: Executor, work: Work
    ) -> Iterator[tuple[Batch, list[TokenRow | Refusal]]]:
        """Each batch with its token rows, in order; a few are under way while the caller works on one."""
        encode: Callable[[list[Sample]], Future[list[TokenRow | Refusal]]]
        if isinstance(executor, ProcessPoolExecutor):
            encode = lambda rows: executor.submit(_encode_in_worker, rows)  # noqa: E731
        else:
            encode = lambda rows: executor.submit(_encode, rows, work)  # noqa: E731
        under_way: deque[tuple[Batch, Future[list[TokenRow | Refusal]]]] = deque()
        for batch in batches:
            under_way.append((batch, encode(batch.rows)))
            if len(under_way) > max(AT_WORK, self.config.workers or 1):
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()

    def _write_shard(self, folder: Path, encoded: Iterator[tuple[Batch, list[TokenRow | Refusal]]]) -> int:
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


def _older_objects_left_alone(batches: Iterator[T]) -> Iterator[T]:
    """The batches; from the second on the garbage collector is spared the objects that were there before, those of
    every imported module.

    It would walk them again and again as rows come and go, for an eighth of the time that Python takes. To ask whether
    somebody else has spared it takes longer than one batch.
    """
    with contextlib.closing(batches), contextlib.ExitStack() as spared:
        for count, batch in enumerate(batches):
            if count == 1 and not gc.get_freeze_count():
                gc.freeze()
                spared.callback(gc.unfreeze)
            yield batch


@contextlib.contextmanager
def _a_thread_for_each_batch() -> Iterator[None]:
    """Have a batch tokenized by the thread that gives it, unless the environment says how.

    Spread over all cores its parts wait for each other, and busily: that costs a third more CPU time, which Python then
    lacks for the next batch.
    """
    if RUST_THREADS in os.environ:
        yield
        return
    os.environ[RUST_THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[RUST_THREADS]


def _is_answered(sample: Sample, measured: set[str]) -> bool:
    return isinstance(sample, Conversation) and sample.origin in measured and sample.ends_with_answer()


def read_hashes(shard: Path) -> np.ndarray:
    """The hashes of the rows that were read for a shard, uint64 (rows,)."""
    return np.load(shard / "hashes.npy")


def read_conversations(shard: Path) -> list[Conversation]:
    """The evaluation conversations of a shard that end with an answer, in order."""
    with open(shard / "eval.jsonl", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [
        Conversation(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
        for content in found
    ]


def _encode(rows: Sequence[Sample], work: Work) -> list[TokenRow | Refusal]:
    if not rows:
        return []
    if isinstance(rows[0], TextRow):
        return work.encoder.encode_texts(rows, work.text_length)
    if isinstance(rows[0], IdsRow):
        return work.checker.checked(rows)
    return work.encoder.encode_conversations(rows)


_worker: Work | None = None
"""What a worker process encodes with, sent to it once."""


def _start_worker(work: Work) -> None:
    global _worker
    _worker = work


def _encode_in_worker(rows: Sequence[Sample]) -> list[TokenRow | Refusal]:
    assert _worker is not None
    return _encode(rows, _worker)
