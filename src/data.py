"""The data pipeline: sources -> conversations or texts -> token rows, with an account of every row.

    data = build_datasets(config.data, tokenizer, context_length=8192)
    data.train[0]             # {"input_ids": [128000, ...], "labels": [-100, ...]}
    data.report["train"]      # rows read, kept and dropped with reasons, tokens, of each source and in all

Nothing is left out unseen: each drop has a reason and a count in the report, and a line in the log.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig, SourceConfig
from src.formats import Conversation, IdsRow, Sample, TextRow, require_assistant_turns, row_converter
from src.mixing import mixed_order, rows_of_a_pass
from src.pretokenized import checked_ids
from src.sources import SourceRows, open_source
from src.tokenization import RowEncoder, TokenRow
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

BATCH_ROWS = 1000
"""Rows that are rendered and tokenized at once."""

COLUMNS = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
)


@dataclass(frozen=True)
class TokenizedData:
    """Everything a run learns from and is measured on.

    `train` and `eval` have the columns input_ids and labels: lists of one length a row, at most `max_length`; a label
    is the id of its own token, or -100 where it is not supervised, which the first of a row never is. `eval` is None
    without evaluation rows; `eval_conversations` are those of its conversations that end with an answer, in order (none
    for texts). `report` is plain JSON.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    eval_conversations: list[Conversation]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """A source's rows with the name of their format."""

    found: SourceRows
    format: str
    rows: Sequence[Sample]
    rows_read: int
    rows_in_eval: int = 0

    @property
    def is_chat(self) -> bool:
        """Whether the rows are conversations."""
        return self.format not in ("text", "tokenized")


@dataclass
class _Tally:
    """What became of the rows of one source, on one side."""

    rows_kept: int = 0
    truncated: int = 0
    texts_split: int = 0
    joined_turns: int = 0
    unlike_served: int = 0
    unlike_served_first: str = ""
    lost_reasoning: int = 0
    special_text: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    longest_origin: str = ""
    dropped: Counter[str] = field(default_factory=Counter)


def build_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None = None
) -> TokenizedData:
    """Read, convert and tokenize all sources of a run.

    Args:
        context_length: the most tokens that the model takes at once; None: not known, so not checked.
    Raises:
        UserError: a source, row, template or length is not right; it says what was found and what to change.
    """
    if not config.train:
        raise UserError("data.train names no source; give at least one, as in data.train.0.path=rows.jsonl")
    if context_length is not None and config.max_length > context_length:
        raise UserError(
            f"data.max_length={config.max_length} exceeds the model's context of {context_length} tokens; lower it to "
            f"{context_length} or less"
        )
    train = [_read(source, f"data.train.{i}", config) for i, source in enumerate(config.train)]
    held_out = [_read(source, f"data.eval.{i}", config) for i, source in enumerate(config.eval)]
    if not held_out and config.eval_fraction > 0:
        train, held_out = _split(train, config.eval_fraction)
    elif held_out:
        train = _apart(train, held_out)
    chat = any(source.is_chat for source in (*train, *held_out))
    encoder = RowEncoder.of(
        tokenizer,
        config.supervise,
        chat=chat,
        template_date=config.template_date,
        allow_special_tokens_in_content=config.allow_special_tokens_in_content,
    )
    if any(source.format == "text" for source in (*train, *held_out)) and tokenizer.eos_token is None:
        log.warning("the tokenizer has no eos_token, so texts end without one; name it in model.special_tokens")
    train_rows, train_report, _ = _tokenize(train, encoder, config, "train")
    eval_rows, eval_report, measured = _tokenize(held_out, encoder, config, "eval") if held_out else (None, None, set())
    return TokenizedData(
        train=train_rows,
        eval=eval_rows,
        eval_conversations=[
            row
            for source in held_out
            for row in source.rows
            if isinstance(row, Conversation) and row.origin in measured and row.ends_with_answer()
        ],
        report={
            "supervise": config.supervise,
            "max_length": config.max_length,
            "overlong": config.overlong,
            "eval_fraction": config.eval_fraction if not config.eval else 0.0,
            "chat_template_sha256": encoder.template.sha256() if encoder.template else None,
            "template_date": config.template_date if encoder.template and encoder.template.writes_date() else None,
            "allow_special_tokens_in_content": config.allow_special_tokens_in_content,
            "unlike_served": config.unlike_served,
            "bos_before_texts": bool(encoder.bos_ids()),
            "train": train_report,
            "eval": eval_report,
        },
    )


def _read(source: SourceConfig, name: str, config: DataConfig) -> _Source:
    found = open_source(source, name)
    convert = row_converter(found, source.format)
    rows = [convert(row) for row in found]
    unused = [column for column in found.columns if column not in convert.columns()]
    log.info(
        "%s: %d rows, %s as %s (columns %s%s)",
        source.path,
        len(rows),
        "taken" if source.format == "auto" else "given",
        convert.format,
        ", ".join(column for column in found.columns if column not in unused),
        f"; {', '.join(unused)} left out" if unused else "",
    )
    taken = _Source(found, convert.format, rows, len(rows))
    first_labels = [row.origin for row in rows if isinstance(row, IdsRow) and row.first_label_dropped]
    if first_labels:
        log.warning(
            "%d rows of %s supervise their first token, which no token comes before; its label is taken as -100: %s",
            len(first_labels),
            source.path,
            ", ".join(first_labels[:3]),
        )
    if taken.is_chat and config.supervise == "assistant":
        require_assistant_turns(rows, source.path)
        empty = [row.origin for row in rows if row.has_empty_answer()]
        if empty:
            log.warning(
                "%d rows of %s have an empty answer, which teaches the model to say nothing: %s",
                len(empty),
                source.path,
                ", ".join(empty[:3]),
            )
    return taken


def content_hash(row: Sample) -> str:
    """The SHA-256 of a row's content as canonical JSON: the same for equal rows, wherever they were read."""
    if isinstance(row, Conversation):
        content: Any = {"messages": list(row.messages), "tools": list(row.tools)}
    else:
        content = row.text if isinstance(row, TextRow) else list(row.input_ids)
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _split(sources: Sequence[_Source], fraction: float) -> tuple[list[_Source], list[_Source]]:
    """Set aside the rows whose hash lies in the lowest `fraction` of all hashes.

    Raises:
        UserError: all rows fall on one side.
    """
    limit = fraction * 16**16
    train, held_out = [], []
    for source in sources:
        sides: tuple[list[Any], list[Any]] = ([], [])
        for row in source.rows:
            sides[int(content_hash(row)[:16], 16) < limit].append(row)
        train.append(replace(source, rows=sides[0]))
        held_out.append(replace(source, rows=sides[1]))
    counts = [sum(len(source.rows) for source in side) for side in (train, held_out)]
    if 0 in counts:
        raise UserError(
            f"data.eval_fraction={fraction} puts {counts[0]} rows on the training and {counts[1]} on the evaluation "
            "side, as equal rows stay together; give more rows, another fraction, or a file of its own as data.eval "
            "(a txt file is one document, unless lines of <|endoftext|> part it)"
        )
    log.info("%d rows for training, %d set aside for evaluation by their content", *counts)
    return train, held_out


def _apart(train: Sequence[_Source], held_out: Sequence[_Source]) -> list[_Source]:
    """The training sources without the rows that stand in the evaluation sources too, which are told."""
    measured = {bytes.fromhex(content_hash(row)) for source in held_out for row in source.rows}
    apart = []
    for source in train:
        both = {row.origin for row in source.rows if bytes.fromhex(content_hash(row)) in measured}
        if both:
            log.warning(
                "%d rows of %s stand in data.eval too; they are left out of training: %s",
                len(both),
                source.found.path,
                ", ".join(row.origin for row in itertools.islice((r for r in source.rows if r.origin in both), 3)),
            )
        kept = [row for row in source.rows if row.origin not in both]
        apart.append(replace(source, rows=kept, rows_in_eval=len(both)))
    return apart


def _encoded(rows: Sequence[Sample], encoder: RowEncoder, max_length: int) -> list[TokenRow]:
    if isinstance(rows[0], TextRow):
        return encoder.encode_texts(rows, max_length)
    if isinstance(rows[0], IdsRow):
        return checked_ids(rows, len(encoder.tokenizer))
    return encoder.encode_conversations(rows)


def _batches(rows: Sequence[Sample], encoder: RowEncoder, config: DataConfig) -> Iterator[list[TokenRow]]:
    parts = [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
    if config.workers in (None, 1) or len(parts) < 2:
        for part in parts:
            yield _encoded(part, encoder, config.max_length)
        return
    count = min(config.workers, len(parts))
    # Spawned, as a fork of a process whose tokenizer has started threads can hang.
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        yield from pool.map(_encoded, parts, [encoder] * len(parts), [config.max_length] * len(parts))


def _tokenize(
    sources: Sequence[_Source], encoder: RowEncoder, config: DataConfig, side: str
) -> tuple[datasets.Dataset, dict[str, Any], set[str]]:
    """Token rows of all sources, one after the other; the account of them; and the origins of those kept."""
    tables, accounts, origins = [], [], set()
    for source in sources:
        tally = _Tally()
        for batch in _batches(source.rows, encoder, config):
            kept = list(_within_length(batch, config, tally))
            origins |= {row.origin for row in kept}
            tables.append(
                datasets.Dataset.from_dict(
                    {"input_ids": [row.input_ids for row in kept], "labels": [row.labels for row in kept]},
                    features=COLUMNS,
                )
            )
        _refuse_overlong(tally, config)
        accounts.append(_account(source, tally))
        _tell(source, tally, side)
    report = {
        "sources": accounts,
        **{
            key: sum(account[key] for account in accounts)
            for key in ("rows_kept", "truncated", "texts_split", "tokens", "supervised_tokens")
        },
        "dropped": dict(sum((Counter(account["dropped"]) for account in accounts), Counter())),
    }
    if report["rows_kept"] == 0:
        raise UserError(
            f"no {side} row is left: {report['dropped'] or 'none was given'}; raise data.max_length="
            f"{config.max_length}, or set data.overlong=truncate (now {config.overlong})"
        )
    table = datasets.concatenate_datasets(tables)
    if side == "train" and any(source.weight or source.epochs > 1 for source in config.train):
        table = _mixed(table, accounts, config)
    return table, report, origins


def _mixed(table: datasets.Dataset, accounts: Sequence[dict[str, Any]], config: DataConfig) -> datasets.Dataset:
    """The rows of one pass; each source's account gets their number."""
    rows = [account["rows_kept"] for account in accounts]
    for account, given in zip(accounts, rows_of_a_pass(rows, config.train), strict=True):
        account["rows_a_pass"] = given
        log.info("%s: %d rows stand in one pass", account["path"], given)
    return table.select(mixed_order(rows, config.train, config.seed))


def _within_length(rows: Iterable[TokenRow], config: DataConfig, tally: _Tally) -> Iterator[TokenRow]:
    """The rows to keep, each of at most `max_length` tokens and with something to learn; all are counted.

    A cut row ends where it is cut: no EOS is put there, as the model would learn to stop in mid-sentence.
    """
    for row in rows:
        tally.joined_turns += row.joined_turns
        tally.lost_reasoning += row.lost_reasoning
        tally.special_text += row.special_text
        if row.unlike_served and not _keep_unlike_served(row, config, tally):
            continue
        tally.texts_split += row.piece == 1
        cut = len(row.input_ids) > config.max_length
        if len(row.input_ids) > tally.longest:
            tally.longest, tally.longest_origin = len(row.input_ids), row.origin
        if cut and config.overlong != "truncate":
            tally.dropped["overlong"] += 1
            continue
        if cut:
            row = TokenRow(row.input_ids[: config.max_length], row.labels[: config.max_length], row.origin)
        supervised = row.supervised_tokens()
        if supervised == 0:
            tally.dropped["nothing supervised after truncation" if cut else "nothing supervised"] += 1
            continue
        tally.truncated += cut
        tally.rows_kept += 1
        tally.tokens += len(row.input_ids)
        tally.supervised_tokens += supervised
        yield row


def _keep_unlike_served(row: TokenRow, config: DataConfig, tally: _Tally) -> bool:
    """Count a row that a server would prompt with another text, and do with it as the config says."""
    tally.unlike_served += 1
    tally.unlike_served_first = tally.unlike_served_first or f"{row.origin}: {row.unlike_served}"
    if config.unlike_served == "error":
        raise UserError(
            f"{row.origin} is written in another way than a server would: {row.unlike_served}; change the row or "
            "model.chat_template, or set data.unlike_served to train_as_served or drop"
        )
    if config.unlike_served == "drop":
        tally.dropped["unlike served"] += 1
    return config.unlike_served != "drop"


def _refuse_overlong(tally: _Tally, config: DataConfig) -> None:
    if config.overlong == "error" and tally.dropped["overlong"]:
        raise UserError(
            f"{tally.dropped['overlong']} rows have more than data.max_length={config.max_length} tokens; the longest "
            f"has {tally.longest} ({tally.longest_origin}). Raise data.max_length, or set data.overlong to drop or "
            "truncate"
        )


def _account(source: _Source, tally: _Tally) -> dict[str, Any]:
    return {
        "path": source.found.path,
        "format": source.format,
        "columns": list(source.found.columns),
        "sha256": source.found.sha256,
        "revision": source.found.revision,
        "rows_read": source.rows_read,
        "rows_in_train_and_eval": source.rows_in_eval,
        "rows": len(source.rows),
        "rows_kept": tally.rows_kept,
        "dropped": dict(tally.dropped),
        "truncated": tally.truncated,
        "texts_split": tally.texts_split,
        "turns_with_joined_white_space": tally.joined_turns,
        "unlike_served": tally.unlike_served,
        "unlike_served_first": tally.unlike_served_first,
        "turns_without_their_reasoning": tally.lost_reasoning,
        "rows_with_text_of_special_tokens": tally.special_text,
        "longest_row_tokens": tally.longest,
        "tokens": tally.tokens,
        "supervised_tokens": tally.supervised_tokens,
    }


def _tell(source: _Source, tally: _Tally, side: str) -> None:
    changes = [f"{count} dropped ({reason})" for reason, count in tally.dropped.items()]
    changes += [f"{tally.truncated} truncated"] if tally.truncated else []
    changes += [f"{tally.texts_split} texts split into pieces"] if tally.texts_split else []
    changes += [f"{tally.joined_turns} turns whose first white space is not supervised"] if tally.joined_turns else []
    changes += [f"{tally.lost_reasoning} turns whose reasoning the template leaves out"] if tally.lost_reasoning else []
    changes += [f"{tally.special_text} rows with the text of a special token"] if tally.special_text else []
    if tally.unlike_served:
        changes.append(f"{tally.unlike_served} written unlike a server would ({tally.unlike_served_first})")
    log.log(
        logging.WARNING
        if tally.dropped or tally.truncated or tally.unlike_served or tally.special_text
        else logging.INFO,
        "%s (%s): %d of %d rows kept, %d tokens, %d of them supervised%s",
        source.found.path,
        side,
        tally.rows_kept,
        len(source.rows),
        tally.tokens,
        tally.supervised_tokens,
        "; " + ", ".join(changes) if changes else "",
    )
