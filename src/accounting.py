"""What became of the rows of a source: kept, cut, split or left out, each counted with a reason.

    tally = Tally()
    kept = tally.keep(encoder.encode_conversations(batch), config)
    tally.as_json()["dropped"]   # {"too long": 3}
    tally.defects["too_long"]    # 3: what `src.contract` looks at
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
from src.refusal import Refusal
from src.tokenization import TokenRow
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

EXAMPLES = 10
"""Rows named for each thing that is told of."""

NAMED = 3
"""Rows named in a line of the log."""

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
    """Counts for one source on one side.

    `defects` counts rows by the check of `data.contract` that they fail, `refused` those of them that could not become
    token rows, and `dropped` token rows by the reason why they are left out. `examples` names the first rows of each
    kind told of, and `reasons` says of the first one what was found. `left_out` are the rows that the counts stand for,
    for whoever writes them down; neither `add` nor JSON knows them.
    """

    rows: int = 0
    rows_kept: int = 0
    truncated: int = 0
    texts_split: int = 0
    turn_by_turn: int = 0
    prompts_apart: int = 0
    lost_reasoning: int = 0
    special_text: int = 0
    empty_answers: int = 0
    first_labels: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    supervised_tokens_lost: int = 0
    longest: int = 0
    longest_origin: str = ""
    defects: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    _last: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, origin: str) -> None:
        """Count one more row for the field `kind`, and keep its place if it is among the first."""
        setattr(self, kind, getattr(self, kind) + 1)
        self._name(kind, [origin])

    def defect(self, check: str, origin: str, reason: str = "") -> None:
        """Count a row that fails a check of `data.contract`; token rows of one row, one after the other, count once."""
        if self._last.get(check) != origin:
            self.defects[check] += 1
            self._name(check, [origin])
            self._last[check] = origin
        if reason:
            self.reasons.setdefault(check, reason)

    def refuse(self, refusal: Refusal) -> None:
        """Count a row that cannot be trained on exactly."""
        self.refused[refusal.kind] += 1
        self.defect(refusal.kind, refusal.origin, refusal.reason)
        self.left_out.append(LeftOut(refusal.origin, f"refused: {refusal.kind}", refusal.reason))

    def leak(self, origin: str) -> None:
        """Count a training row that is left out because it is evaluated on."""
        self.defect("leak", origin)
        self.left_out.append(LeftOut(origin, "in train and eval"))

    def _name(self, kind: str, origins: Sequence[str]) -> None:
        named = self.examples.setdefault(kind, [])
        named += origins[: EXAMPLES - len(named)]

    def add(self, other: "Tally") -> None:
        """Take in the counts of rows that come after these."""
        for part in dataclasses.fields(Tally):
            if part.type is int and part.name != "longest":
                setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        if other.longest > self.longest:
            self.longest, self.longest_origin = other.longest, other.longest_origin
        self.defects += other.defects
        self.refused += other.refused
        self.dropped += other.dropped
        for kind, origins in other.examples.items():
            self._name(kind, origins)
        self.reasons = other.reasons | self.reasons

    def rows_read(self) -> int:
        """The rows that were read, if no other tally counts some of them."""
        return self.rows + self.defects["leak"]

    def as_json(self) -> dict[str, Any]:
        """The counts as plain JSON."""
        counts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        del counts["left_out"], counts["_last"]
        return counts | {name: dict(counts[name]) for name in ("defects", "refused", "dropped")}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "Tally":
        """The tally that `as_json` told."""
        return cls(**content | {name: Counter(content[name]) for name in ("defects", "refused", "dropped")})

    def keep(self, rows: Iterable[TokenRow | Refusal], config: DataConfig) -> list[TokenRow]:
        """The rows that are trained, each of at most `max_length` tokens and with something to learn.

        A cut row ends where it is cut: no EOS is put there, as the model would learn to stop in mid-sentence.

        Raises:
            UserError: a row is written unlike a server would, and the config makes that an error.
        """
        kept = (self.refuse(row) if isinstance(row, Refusal) else self._kept(row, config) for row in rows)
        return [row for row in kept if row is not None]

    def _kept(self, row: TokenRow, config: DataConfig) -> TokenRow | None:
        self.prompts_apart += row.prompt_apart
        self.lost_reasoning += row.lost_reasoning
        self.special_text += row.special_text
        self.texts_split += row.piece == 1 and not row.turn_rows
        self.turn_by_turn += row.piece == 0 and row.turn_rows > 0
        if row.clock_dependent:
            self.defect("date_drift", row.origin)
        if row.unlike_served and not self._keep_unlike_served(row, config):
            return None
        supervised, length = row.supervised_tokens(), len(row.input_ids)
        if length > self.longest:
            self.longest, self.longest_origin = length, row.origin
        if length > config.max_length:
            if config.too_long != "truncate":
                return self._drop("too_long", "too long", row, supervised)
            whole, lost = row, supervised
            row = dataclasses.replace(
                row, input_ids=row.input_ids[: config.max_length], labels=row.labels[: config.max_length]
            )
            supervised = row.supervised_tokens()
            if supervised == 0:
                return self._drop("answer_truncated", "nothing supervised after truncation", whole, lost)
            self.supervised_tokens_lost += lost - supervised
            self.truncated += 1
            self.left_out.append(LeftOut(row.origin, "truncated", tokens=length))
        elif supervised == 0:
            return self._drop("masked" if row.piece == 0 else None, "nothing supervised", row, 0)
        self.rows_kept += 1
        self.tokens += len(row.input_ids)
        self.supervised_tokens += supervised
        return row

    def _drop(self, check: str | None, reason: str, row: TokenRow, supervised: int, detail: str = "") -> None:
        if check:
            self.defect(check, row.origin, detail)
        self.dropped[reason] += 1
        self.supervised_tokens_lost += supervised
        self.left_out.append(LeftOut(row.origin, reason, detail, len(row.input_ids)))

    def _keep_unlike_served(self, row: TokenRow, config: DataConfig) -> bool:
        """Count a row that a server would prompt with another text, and do with it as the config says."""
        if config.unlike_served == "error":
            raise UserError(
                f"{row.origin} is written in another way than a server would: {row.unlike_served}; change the row or "
                "model.chat_template, or set data.unlike_served to train_as_served or drop"
            )
        if config.unlike_served == "drop":
            self._drop(None, "unlike served", row, row.supervised_tokens(), row.unlike_served)
            return False
        self.defect("prompt_not_prefix", row.origin, f"{row.origin}: {row.unlike_served}")
        return True

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

    def tell(self, path: str, side: str, percentiles: dict[str, int]) -> None:
        """Say in the log what became of the rows of a source, and warn of what may not be meant.

        Args:
            percentiles: the tokens that so many in a hundred of the rows that are kept have at most.
        """
        lengths = ""
        if percentiles:
            least, half, most = (percentiles[share] for share in ("0", "50", "100"))
            lengths = f", rows of {least} to {most}, half of them of at most {half}"
        for kind, meaning in (
            ("empty_answers", "have an empty answer, which teaches the model to say nothing"),
            ("first_labels", "supervise their first token, which no token comes before; its label is taken as -100"),
        ):
            if getattr(self, kind):
                named = ", ".join(self.examples[kind][:NAMED])
                log.warning("%d rows of %s %s: %s", getattr(self, kind), path, meaning, named)
        worth = (self.defects, self.dropped, self.truncated, self.special_text, self.lost_reasoning)
        log.log(
            logging.WARNING if any(worth) else logging.INFO,
            "%s (%s): %d of %d rows kept, %d tokens, %d (%.1f%%) of them supervised%s%s",
            path,
            side,
            self.rows_kept,
            self.rows,
            self.tokens,
            self.supervised_tokens,
            100 * self.supervised_tokens / max(1, self.tokens),
            lengths,
            "".join(f"; {change}" for change in self.changes()),
        )

    def changes(self) -> list[str]:
        """What was not kept as it was, each with its number."""
        found = [f"{count} refused ({kind})" for kind, count in self.refused.items()]
        found += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        counted = (
            (self.truncated, "truncated"),
            (self.supervised_tokens_lost, "supervised tokens lost by that"),
            (self.texts_split, "texts split into pieces"),
            (self.turn_by_turn, "conversations trained as a row for each turn, as a server would give it"),
            (self.defects["leak"], "left out that stand in data.eval too"),
            (self.defects["duplicates"], "equal to a row before"),
            (self.prompts_apart, "rows whose prompt is tokenized by itself, as a server would"),
            (self.lost_reasoning, "turns whose reasoning the template leaves out"),
            (self.special_text, "rows with the text of a special token"),
            (self.defects["prompt_not_prefix"], "written unlike a server would"),
            (self.defects["null_padded_tools"], "with tools that a table had padded, which is taken out"),
            (self.defects["date_drift"], "with the clock's date"),
        )
        return found + [f"{count} {meaning}" for count, meaning in counted if count]
