"""The data pipeline: sources -> conversations or texts -> token rows, with an account of every row.

    data = build_datasets(config.data, tokenizer, context_length=8192)
    data.train[0]             # {"input_ids": [128000, ...], "labels": [-100, ...]}
    data.report["train"]      # rows read, kept and dropped with reasons, tokens, of each source and in all

Nothing is left out unseen: each drop has a reason and a count in the report, and a line in the log. Token rows are kept
on disk, where the next run with the same data, tokenizer and settings finds them.
"""

import functools
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig, OutputConfig, SourceConfig
from src.accounting import LeftOut, Tally, read_left_out
from src.cache import cache_key, content_of, load_rows, prepared, read_account, shard_name
from src.contract import ContractError, Finding, findings
from src.eviction import keep_within
from src.formats import Conversation, row_converter
from src.mixing import mixed_order, rows_of_a_pass
from src.packing import length_percentiles, row_lengths
from src.preparation import OpenSource, Preparation, content_hash, read_conversations, read_hashes
from src.sources import open_source
from src.tokenization import RowEncoder
from utils.digests import Digests
from utils.errors import UserError
from utils.launch import is_first_of_machine
from utils.logging import get_logger

log = get_logger(__name__)

DIGESTS = "digests.json"
"""File in the cache folder that remembers what data files hold."""

__all__ = [
    "TokenizedData",
    "account",
    "build_datasets",
    "content_hash",
    "known_digests",
    "open_sources",
    "token_rows",
    "totals",
]


@dataclass(frozen=True)
class TokenizedData:
    """Everything a run learns from and is measured on.

    `train` and `eval` have the columns input_ids and labels: lists of one length a row, at most `max_length`; a label
    is the id of its own token, or -100 where it is not supervised, which the first of a row never is; and origin, the
    place where the row was read. Both are mapped from disk. `eval` is None without evaluation rows;
    `eval_conversations` are those of its conversations that end with an answer, in order (none for texts). `report` is
    plain JSON. `findings` are the defects that rows have, for `src.contract.enforce`; `left_out("train")` reads from
    disk which rows are not trained on, or are cut, and why; `hashes()` those of all rows. `train` is None where its
    sources are streamed, see `src.streaming`.
    """

    train: datasets.Dataset | None
    eval: datasets.Dataset | None
    eval_conversations: list[Conversation]
    report: dict[str, Any]
    findings: list[Finding]
    left_out: Callable[[str], Iterator[LeftOut]]
    hashes: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class _Prepared:
    """A source's shards, and what became of its rows on each side."""

    source: OpenSource
    shards: list[Path]
    rows_read: int
    tallies: dict[str, Tally]

    def both_sides(self) -> Tally:
        """The counts of all its rows."""
        tally = Tally()
        for part in self.tallies.values():
            tally.add(part)
        return tally


def token_folder(data: DataConfig, output: OutputConfig) -> Path:
    """Where a run keeps its token rows."""
    return Path(data.cache_folder or f"{output.folder}/.data")


def build_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    cache_folder: Path | None = None,
) -> TokenizedData:
    """Read, convert and tokenize all sources of a run, or find that done.

    Args:
        context_length: the most tokens that the model takes at once; None: not known, so not checked.
        cache_folder: where token rows are kept for the next run, which several processes may share; None: in a
            temporary folder, for as long as this process lasts.
    Raises:
        UserError: a source, template or length is not right; it says what was found and what to change. A row that is
            not right is left out, and is among the findings.
        ContractError: no row is left, and more of them have a defect than may have it.
    """
    if config.streaming:
        raise UserError(
            "data.streaming keeps no rows, and all are wanted here; set data.streaming=False, and "
            "data.train.0.max_rows for a part of them"
        )
    digests = known_digests(cache_folder)
    sources, encoder = open_sources(config, tokenizer, context_length, digests)
    return token_rows(config, tokenizer, sources, encoder, digests, cache_folder)


def known_digests(cache_folder: Path | None) -> Digests:
    """What earlier runs found that data files hold."""
    return Digests(cache_folder / DIGESTS if cache_folder else None)


def open_sources(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None, digests: Digests
) -> tuple[list[OpenSource], RowEncoder]:
    """The sources of a run, those of evaluation first, and what encodes their rows.

    Raises:
        UserError: a source, template or length is not right.
    """
    if not config.train:
        raise UserError("data.train names no source; give at least one, as in data.train.0.path=rows.jsonl")
    if context_length is not None and config.max_length > context_length:
        raise UserError(
            f"data.max_length={config.max_length} exceeds the model's context of {context_length} tokens; lower it to "
            f"{context_length} or less"
        )
    given = [(f"data.eval.{i}", source, "eval") for i, source in enumerate(config.eval)]
    given += [(f"data.train.{i}", source, "train") for i, source in enumerate(config.train)]
    sources = [
        _open(source, name, index, side, digests, streams=config.streaming and side == "train")
        for index, (name, source, side) in enumerate(given)
    ]
    _check_too_long(config, sources)
    encoder = RowEncoder.of(
        tokenizer,
        config.supervise,
        chat=any(source.is_chat for source in sources),
        template_date=config.template_date,
        allow_special_tokens_in_content=config.allow_special_tokens_in_content,
        unlike_served=config.unlike_served,
    )
    if any(source.convert.format == "text" for source in sources) and tokenizer.eos_token is None:
        log.warning("the tokenizer has no eos_token, so texts end without one; name it in model.special_tokens")
    return sources, encoder


def token_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[OpenSource],
    encoder: RowEncoder,
    digests: Digests,
    cache_folder: Path | None,
) -> TokenizedData:
    """The token rows of sources, prepared or found prepared; see `build_datasets`.

    Raises:
        UserError: a row or the disk is not right.
    """
    key = cache_key(config, tokenizer, [source.found for source in sources])
    temporary = None if cache_folder else Path(tempfile.mkdtemp(prefix="smolfactory-data-"))
    place = (cache_folder or temporary) / key
    try:
        digests.save()
        use = prepared(place, functools.partial(_prepare, sources=sources, config=config, encoder=encoder))
        if cache_folder and is_first_of_machine():
            keep_within(cache_folder, config.cache_gib, keep=place)
        data = _load([_found(place, source) for source in sources], config, encoder)
    except BaseException as error:
        if temporary:
            shutil.rmtree(temporary)
        if isinstance(error, OSError):
            raise UserError(
                f"the token rows could not be written to {place} ({error}); free some space, or give another "
                "data.cache_folder"
            ) from error
        raise
    weakref.finalize(data, use.release)
    if temporary:
        weakref.finalize(data, shutil.rmtree, temporary, ignore_errors=True)
    return data


def _open(source: SourceConfig, name: str, index: int, side: str, digests: Digests, *, streams: bool) -> OpenSource:
    found = open_source(source, name, digests, streams=streams)
    convert = row_converter(found, source.format)
    unused = [column for column in found.columns if column not in convert.columns()]
    log.info(
        "%s: %s as %s (columns %s%s)",
        source.path,
        "taken" if source.format == "auto" else "given",
        convert.format,
        ", ".join(column for column in found.columns if column not in unused),
        f"; {', '.join(unused)} left out" if unused else "",
    )
    return OpenSource(found, convert, index, side)


def _check_too_long(config: DataConfig, sources: Sequence[OpenSource]) -> None:
    whole = [source for source in sources if source.convert.format != "text"]
    if config.too_long == "split" and whole:
        raise UserError(
            f"data.too_long=split is for texts, and {whole[0].found.path} holds {whole[0].convert.format}, of which a "
            "later piece would lack what it answers; use drop or truncate, or auto, which splits texts alone"
        )


def _prepare(folder: Path, *, sources: Sequence[OpenSource], config: DataConfig, encoder: RowEncoder) -> None:
    preparation = Preparation(config, encoder, folder)
    for source in sources:
        preparation.write(source)


def _found(folder: Path, source: OpenSource) -> _Prepared:
    """What stands on disk of a source."""
    shards: list[Path] = []
    tallies, rows_read = {"train": Tally(), "eval": Tally()}, 0
    while (account := read_account(shard := folder / shard_name(source.index, len(shards)))) is not None:
        rows_read += account["rows_read"]
        for side, tally in account["tallies"].items():
            tallies[side].add(Tally.of_json(tally))
        shards.append(shard)
    return _Prepared(source, shards, rows_read, tallies)


def _load(sources: Sequence[_Prepared], config: DataConfig, encoder: RowEncoder) -> TokenizedData:
    train = [source for source in sources if source.source.side == "train"]
    held_out = [source for source in sources if source.source.side == "eval"]
    whole = [(source.source.found.path, source.rows_read, source.both_sides()) for source in sources]
    found = findings(whole, config.contract)
    if not held_out and config.eval_fraction > 0:
        _check_split(train, config.eval_fraction, found)
        held_out = train
    train_report = _report(train, config, "train", found) if train else None
    eval_report = _report(held_out, config, "eval", found) if held_out else None
    rows = load_rows([shard for source in train for shard in source.shards], "train")
    if train and any(source.weight or source.epochs > 1 for source in config.train):
        rows = _mixed(rows, train_report["sources"], config)
    shards = [shard for source in held_out for shard in source.shards]
    every_shard = [shard for source in sources for shard in source.shards]
    return TokenizedData(
        train=rows,
        eval=load_rows(shards, "eval"),
        eval_conversations=[row for shard in shards for row in read_conversations(shard)],
        report={
            "supervise": config.supervise,
            "max_length": config.max_length,
            "too_long": config.too_long,
            "eval_fraction": config.eval_fraction if not config.eval else 0.0,
            "chat_template_sha256": encoder.template.sha256() if encoder.template else None,
            "template_date": config.template_date if encoder.template and encoder.template.writes_date() else None,
            "allow_special_tokens_in_content": config.allow_special_tokens_in_content,
            "unlike_served": config.unlike_served,
            "bos_before_texts": bool(encoder.bos_ids()),
            "train": train_report,
            "eval": eval_report,
            "findings": [finding.as_json() for finding in found],
        },
        findings=found,
        left_out=functools.partial(read_left_out, every_shard),
        hashes=functools.partial(map, read_hashes, every_shard),
    )


def _nothing_left(message: str, found: Sequence[Finding]) -> UserError:
    """The error of a side without rows, with what the contract says of those that were read."""
    return ContractError(found, message) if any(finding.broken for finding in found) else UserError(message)


def _check_split(sources: Sequence[_Prepared], fraction: float, found: Sequence[Finding]) -> None:
    """
    Raises:
        UserError: all rows fall on one side.
    """
    counts = [sum(source.tallies[side].rows for source in sources) for side in ("train", "eval")]
    if 0 in counts:
        raise _nothing_left(
            f"data.eval_fraction={fraction} puts {counts[0]} rows on the training and {counts[1]} on the evaluation "
            "side, as equal rows stay together; give more rows, another fraction, or a file of its own as data.eval "
            "(a txt file is one document, unless lines of <|endoftext|> part it)",
            found,
        )
    log.info("%d rows for training, %d set aside for evaluation by their content", *counts)


def _report(sources: Sequence[_Prepared], config: DataConfig, side: str, found: Sequence[Finding]) -> dict[str, Any]:
    """The account of all rows on a side, which is told in the log too.

    Raises:
        UserError: no row is left, or one is too long and that is an error.
    """
    accounts = []
    for source in sources:
        tally = source.tallies[side]
        tally.refuse_too_long(config)
        rows = load_rows(source.shards, side)
        percentiles = length_percentiles(row_lengths(rows)) if rows else {}
        tally.tell(source.source.found.path, side, percentiles)
        accounts.append(account(source.source, source.rows_read, tally, percentiles))
    report = totals(accounts)
    if report["rows_kept"] == 0:
        lost = {f"refused: {kind}": count for kind, count in report["refused"].items()} | report["dropped"]
        message = f"no {side} row is left: {lost or 'data.eval has all of them'}"
        if report["dropped"]:
            message += (
                f"; raise data.max_length={config.max_length}, or set data.too_long=truncate (now {config.too_long})"
            )
        raise _nothing_left(message, found)
    return report


def totals(accounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The accounts of sources, and their sums."""
    return {
        "sources": accounts,
        **{
            key: sum(account[key] for account in accounts)
            for key in (
                "rows_kept",
                "truncated",
                "texts_split",
                "duplicated",
                "tokens",
                "supervised_tokens",
                "supervised_tokens_lost",
            )
        },
        **{
            key: dict(sum((Counter(account[key]) for account in accounts), Counter())) for key in ("refused", "dropped")
        },
    }


def account(source: OpenSource, rows_read: int, tally: Tally, percentiles: dict[str, int]) -> dict[str, Any]:
    """What became of a source's rows, as plain JSON."""
    found = source.found
    return {
        "path": found.path,
        "format": source.convert.format,
        "columns": list(found.columns),
        "sha256": content_of(found)[0],
        "revision": found.revision,
        "rows_read": rows_read,
        "rows_in_train_and_eval": tally.defects["leak"],
        "rows": tally.rows,
        "rows_kept": tally.rows_kept,
        "duplicated": tally.defects["duplicates"],
        "refused": dict(tally.refused),
        "dropped": dict(tally.dropped),
        "truncated": tally.truncated,
        "texts_split": tally.texts_split,
        "prompts_tokenized_apart": tally.prompts_apart,
        "unlike_served": tally.defects["prompt_not_prefix"] + tally.dropped["unlike served"],
        "turns_without_their_reasoning": tally.lost_reasoning,
        "rows_with_text_of_special_tokens": tally.special_text,
        "longest_row_tokens": tally.longest,
        "length_percentiles": percentiles,
        "tokens": tally.tokens,
        "supervised_tokens": tally.supervised_tokens,
        "supervised_share": round(tally.supervised_tokens / max(1, tally.tokens), 4),
        "supervised_tokens_lost": tally.supervised_tokens_lost,
        "examples": tally.examples,
        "reasons": tally.reasons,
    }


def _mixed(table: datasets.Dataset, accounts: Sequence[dict[str, Any]], config: DataConfig) -> datasets.Dataset:
    """The rows of one pass; each source's account gets their number."""
    rows = [account["rows_kept"] for account in accounts]
    for account, given in zip(accounts, rows_of_a_pass(rows, config.train), strict=True):
        account["rows_a_pass"] = given
        log.info("%s: %d rows stand in one pass", account["path"], given)
    return table.select(mixed_order(rows, config.train, config.seed))
