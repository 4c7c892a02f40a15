"""What became of the rows of a source: kept, cut, split or left out, each counted with a reason.

    tally = Tally()
    kept = tally.keep(encoder.encode_conversations(batch), config)
    tally.as_json()["dropped"]   # {"too long": 3}
    tally.left_out[0]            # LeftOut("rows.jsonl line 7", "too long", tokens=5210)

A tally is kept with each shard of token rows, so that a run which finds them prepared tells the same.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.schema import DataConfig
from src.tokenization import TokenRow
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

EXAMPLES = 3
"""Rows named for each thing that is told of."""

LEFT_OUT = "left_out.jsonl"
"""A shard's file of the rows that were left out or cut, one a line."""


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained on, or is cut; `reason` is a few words, `detail` the whole sentence or nothing.

    `tokens` is the row's length where it was tokenized, else None.
    """

    origin: str
    reason: str
    detail: str = ""
    tokens: int | None = None
    side: str = "train"


def write_left_out(shard: Path, rows: Iterable[LeftOut]) -> None:
    """Add rows to those that a shard names."""
    with open(shard / LEFT_OUT, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)


def read_left_out(shards: Sequence[Path], side: str) -> Iterator[LeftOut]:
    """The rows of a side that were left out or cut, in order, read from disk as they are asked for."""
    for shard in shards:
        with open(shard / LEFT_OUT, encoding="utf-8") as lines:
            rows = (LeftOut(**json.loads(line)) for line in lines)
            yield from (row for row in rows if row.side == side)


@dataclass
class Tally:
    """Counts for one source on one side; `examples` names the first rows of each kind told of.

    `left_out` are the rows that the counts stand for, for whoever writes them down; neither `add` nor JSON knows them.
    """

    rows: int = 0
    rows_kept: int = 0
    truncated: int = 0
    texts_split: int = 0
    duplicated: int = 0
    joined_turns: int = 0
    unlike_served: int = 0
    lost_reasoning: int = 0
    special_text: int = 0
    empty_answers: int = 0
    first_labels: int = 0
    in_train_and_eval: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    supervised_tokens_lost: int = 0
    longest: int = 0
    longest_origin: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def note(self, kind: str, origin: str) -> None:
        """Count one more row for the field `kind`, and keep its place if it is among the first."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.name_example(kind, origin)

    def name_example(self, kind: str, origin: str) -> None:
        """Keep a row's place if it is among the first of its kind."""
        named = self.examples.setdefault(kind, [])
        if len(named) < EXAMPLES:
            named.append(origin)

    def add(self, other: "Tally") -> None:
        """Take in the counts of rows that come after these."""
        for part in dataclasses.fields(Tally):
            if part.type is int and part.name != "longest":
                setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        if other.longest > self.longest:
            self.longest, self.longest_origin = other.longest, other.longest_origin
        self.dropped += other.dropped
        for kind, origins in other.examples.items():
            for origin in origins:
                self.name_example(kind, origin)

    def as_json(self) -> dict[str, Any]:
        """The counts as plain JSON."""
        counts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self) if part.name != "left_out"}
        return counts | {"dropped": dict(self.dropped)}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "Tally":
        """The tally that `as_json` told."""
        return cls(**content | {"dropped": Counter(content["dropped"])})

    def keep(self, rows: Iterable[TokenRow], config: DataConfig) -> list[TokenRow]:
        """The rows that are trained, each of at most `max_length` tokens and with something to learn.

        A cut row ends where it is cut: no EOS is put there, as the model would learn to stop in mid-sentence.

        Raises:
            UserError: a row is written unlike a server would, and the config makes that an error.
        """
        kept = (self._kept(row, config) for row in rows)
        return [row for row in kept if row is not None]

    def _kept(self, row: TokenRow, config: DataConfig) -> TokenRow | None:
        self.joined_turns += row.joined_turns
        self.lost_reasoning += row.lost_reasoning
        self.special_text += row.special_text
        self.texts_split += row.piece == 1
        if row.unlike_served and not self._keep_unlike_served(row, config):
            return None
        supervised, length = row.supervised_tokens(), len(row.input_ids)
        if length > self.longest:
            self.longest, self.longest_origin = length, row.origin
        cut = length > config.max_length
        if cut:
            if config.too_long != "truncate":
                return self._drop("too long", row, supervised)
            whole = row
            row = dataclasses.replace(
                row, input_ids=row.input_ids[: config.max_length], labels=row.labels[: config.max_length]
            )
            lost, supervised = supervised, row.supervised_tokens()
            if supervised == 0:
                return self._drop("nothing supervised after truncation", whole, lost)
            self.supervised_tokens_lost += lost - supervised
            self.truncated += 1
            self.left_out.append(LeftOut(row.origin, "truncated", tokens=length))
        elif supervised == 0:
            return self._drop("nothing supervised", row, 0)
        self.rows_kept += 1
        self.tokens += len(row.input_ids)
        self.supervised_tokens += supervised
        return row

    def _drop(self, reason: str, row: TokenRow, supervised: int, detail: str = "") -> None:
        self.dropped[reason] += 1
        self.supervised_tokens_lost += supervised
        self.name_example(reason, row.origin)
        self.left_out.append(LeftOut(row.origin, reason, detail, len(row.input_ids)))

    def _keep_unlike_served(self, row: TokenRow, config: DataConfig) -> bool:
        """Count a row that a server would prompt with another text, and do with it as the config says."""
        self.note("unlike_served", f"{row.origin}: {row.unlike_served}")
        if config.unlike_served == "error":
            raise UserError(
                f"{row.origin} is written in another way than a server would: {row.unlike_served}; change the row or "
                "model.chat_template, or set data.unlike_served to train_as_served or drop"
            )
        if config.unlike_served == "drop":
            self._drop("unlike served", row, row.supervised_tokens(), row.unlike_served)
        return config.unlike_served != "drop"

    def refuse_too_long(self, config: DataConfig) -> None:
        """
        Raises:
            UserError: rows were too long, and the config makes that an error.
        """
        if config.too_long == "error" and self.dropped["too long"]:
            raise UserError(
                f"{self.dropped['too long']} rows have more than data.max_length={config.max_length} tokens; the "
                f"longest has {self.longest} ({self.longest_origin}). Raise data.max_length, or set data.too_long to "
                "drop or truncate"
            )

    def tell(self, path: str, side: str) -> None:
        """Say in the log what became of the rows of a source, and warn of what may not be meant."""
        for kind, meaning in (
            ("empty_answers", "have an empty answer, which teaches the model to say nothing"),
            ("first_labels", "supervise their first token, which no token comes before; its label is taken as -100"),
            ("in_train_and_eval", "stand in data.eval too; they are left out of training"),
        ):
            if getattr(self, kind):
                log.warning("%d rows of %s %s: %s", getattr(self, kind), path, meaning, self._named(kind))
        worth = (self.dropped, self.truncated, self.special_text, self.unlike_served, self.lost_reasoning)
        log.log(
            logging.WARNING if any(worth) else logging.INFO,
            "%s (%s): %d of %d rows kept, %d tokens, %d of them supervised%s",
            path,
            side,
            self.rows_kept,
            self.rows,
            self.tokens,
            self.supervised_tokens,
            "".join(f"; {change}" for change in self._changes()),
        )

    def _named(self, kind: str) -> str:
        return ", ".join(self.examples.get(kind, ()))

    def _changes(self) -> list[str]:
        found = [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        counted = (
            (self.truncated, "truncated"),
            (self.supervised_tokens_lost, "supervised tokens lost by that"),
            (self.texts_split, "texts split into pieces"),
            (self.duplicated, "equal to a row before"),
            (self.joined_turns, "turns whose first white space is not supervised"),
            (self.lost_reasoning, "turns whose reasoning the template leaves out"),
            (self.special_text, "rows with the text of a special token"),
            (self.unlike_served, f"written unlike a server would ({self._named('unlike_served')})"),
        )
        return found + [f"{count} {meaning}" for count, meaning in counted if count]
