"""Training rows that are read while the run goes on: sources larger than the disk, through the same formats and masks.

    stream, data = stream_datasets(config.data, tokenizer, cache_folder=folder)     # data.eval is prepared as ever
    feed = StreamFeed(stream, StepSplit(rows=8), seed=42, steps=1000)
    for packs in feed:                       # this process's micro-batches
        batch = collator(packs)

A window of rows is read, rendered, tokenized and packed, and its packs are given in an order by seed, epoch and window;
a run has the next one made meanwhile. What was left in packs that could not be filled goes into the next window.
Nothing is written, and no more than two windows are held. Each process reads the whole stream and takes its own share
of every step, so the order does not depend on how many they are. Where it stands is saved with each checkpoint; a
resumed run reads its sources again up to there, without tokenizing what comes before, and compares what it reads with
hashes that were saved as well.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig
from src.accounting import Tally
from src.batches import Packs, StepSplit, micro_batches
from src.contract import Finding, enforce, findings
from src.data import TokenizedData, account, known_digests, open_sources, token_rows, totals
from src.mixing import rows_of_a_window
from src.packing import best_fit_bins
from src.preparation import OpenSource, Preparation
from src.sources import Row
from src.stream_place import ChainedRows, Place, TokenArrays
from utils.ahead import Ahead, Halt
from utils.errors import UserError, in_one_line
from utils.hash_chain import START, extended
from utils.json_text import ANOTHER_CHECKPOINT, read_json_file
from utils.logging import get_logger

log = get_logger(__name__)

LEFT_OVER_PACKS = 64
"""Most packs of a window whose rows are kept for the next one."""

FILLED = 0.98
"""Share of its room from which a pack counts as full, so that its rows are not kept."""


class RowStream:
    """The rows of a run's training sources as packs, window by window and epoch by epoch."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[OpenSource],
        preparation: Preparation,
        look_at: Callable[[Sequence[Finding]], None] = enforce,
    ) -> None:
        """
        Args:
            sources: those of the training rows.
            preparation: what knows the rows that are held out for evaluation.
            look_at: holds the defects of the first window's rows against the contract, and raises where they break it.
        """
        self.config = config
        self.sources = sources
        self.preparation = preparation
        self.look_at = look_at
        self.start = Place(0, 0, (0,) * len(sources), tuple(Tally() for _ in sources))
        self.tell_others: Callable[[str], None] = _refuse_others
        """Told what is found where rows that are read again are not those that were read before."""

    def packed(self, packing: bool) -> "RowStream":
        """The same rows, sharing packs or not."""
        return RowStream(replace(self.config, packing=packing), self.sources, self.preparation, self.look_at)

    def packs_rows(self) -> bool:
        """Whether some rows share a pack."""
        return self.config.packing

    def windows(
        self, place: Place, check: Callable[[], None] = lambda: None
    ) -> Generator[tuple[Place, Packs, Place], None, None]:
        """The packs of each window from `place` on, with the place before and after it; without end.

        Args:
            check: called for every row that is read or prepared; what it raises ends the work.
        Raises:
            ContractError: more of the first window's rows have a defect than may have it.
            UserError: a whole epoch gives no row to train on, or as reading and preparing rows do.
        """
        while True:
            readers = [
                ChainedRows(_checked(self._rows(source, given.epochs), check))
                for source, given in zip(self.sources, self.config.train, strict=True)
            ]
            self._pass_by(readers, place)
            ended = False
            while not ended:
                drawn, ended = self._draw(readers, place.window)
                tallies, rows = self._prepared(drawn, place.tallies, check)
                packs, left_over = self._packed(place.left_over, rows, keeps=not ended)
                read = tuple(before + len(own) for before, own in zip(place.rows_read, drawn, strict=True))
                if place.epoch > 0:
                    tallies = place.tallies  # the rows of a later epoch are those of the first
                elif place.window == 0:
                    self.look_at(self._findings(tallies))
                chains = tuple(reader.chain for reader in readers)
                after = Place(place.epoch, place.window + 1, read, tallies, left_over, chains)
                yield place, packs, after
                place = after
            if not any(tally.rows_kept for tally in place.tallies):
                raise UserError(
                    f"no training row is left of the {sum(place.rows_read)} that were read; the lines above say why"
                )
            place = Place(place.epoch + 1, 0, self.start.rows_read, place.tallies)

    def _pass_by(self, readers: Sequence[ChainedRows], place: Place) -> None:
        """Read the rows before a place again, which are to be those that were read when it was noted."""
        expected = place.chains or (None,) * len(readers)
        for source, reader, read, chain in zip(self.sources, readers, place.rows_read, expected, strict=True):
            for _ in itertools.islice(reader, read):
                pass
            if chain not in (None, reader.chain):
                self.tell_others(f"the first {read:,} rows of {source.found.path}")

    @staticmethod
    def _rows(source: OpenSource, epochs: int) -> Iterator[Row]:
        """The rows of a source in one epoch of the stream, in which it may stand several times."""
        for _ in range(epochs):
            yield from source.found

    def _draw(self, readers: Sequence[Iterator[Row]], window: int) -> tuple[list[list[Row]], bool]:
        """The rows of a window, for each source its own, and whether they are the last of the epoch.

        With weights each source gives its share, and the first that has no more ends the epoch; else they come one
        source after the other.
        """
        size = self.config.stream_window_rows
        weights = [source.weight for source in self.config.train]
        if None in weights:
            drawn = []
            for reader in readers:
                drawn.append(list(itertools.islice(reader, size - sum(map(len, drawn)))))
            return drawn, sum(map(len, drawn)) < size
        wanted = rows_of_a_window(weights, window, size)
        drawn = [list(itertools.islice(reader, count)) for reader, count in zip(readers, wanted, strict=True)]
        share = min(len(rows) / count for rows, count in zip(drawn, wanted, strict=True) if count)
        return [rows[: round(share * count)] for rows, count in zip(drawn, wanted, strict=True)], share < 1

    def _prepared(
        self, drawn: Sequence[Sequence[Row]], before: Sequence[Tally], check: Callable[[], None]
    ) -> tuple[tuple[Tally, ...], list[TokenArrays]]:
        """The rows that are trained of those that were drawn, and each source's counts with these."""
        tallies, kept = [], []
        for source, rows, counts in zip(self.sources, drawn, before, strict=True):
            tallies.append(Tally())
            tallies[-1].add(counts)
            for batch, encoded in self.preparation.encoded(source, _checked(rows, check)):
                tally = batch.tallies["train"]
                for row in tally.keep(encoded, self.config):
                    kept.append((np.array(row.input_ids, dtype=np.int32), np.array(row.labels, dtype=np.int32)))
                tallies[-1].add(tally)
            tallies[-1].refuse_too_long(self.config)
        return tuple(tallies), kept

    def _packed(
        self, left_over: Sequence[TokenArrays], rows: Sequence[TokenArrays], *, keeps: bool
    ) -> tuple[Packs, tuple[TokenArrays, ...]]:
        """Packs, and the rows that are kept for the next window: those of packs that are not full, none of which was
        kept before."""
        rows = [*left_over, *rows]
        room = self.config.max_length
        if not self.config.packing:
            return [_pack([row]) for row in rows], ()
        bins = best_fit_bins([len(ids) for ids, _ in rows], room)
        filled = [sum(len(rows[index][0]) for index in pack) for pack in bins]
        open_bins = [n for n, pack in enumerate(bins) if filled[n] < FILLED * room and min(pack) >= len(left_over)]
        kept = set(sorted(open_bins, key=filled.__getitem__)[:LEFT_OVER_PACKS]) if keeps else set()
        packs = [_pack([rows[index] for index in pack]) for n, pack in enumerate(bins) if n not in kept]
        return packs, tuple(rows[index] for n in sorted(kept) for index in bins[n])

    def describe(self, max_length: int) -> dict[str, Any]:
        """For the run's record: what is known of the packs before they are made."""
        return {"window_rows": self.config.stream_window_rows, "max_length": max_length}

    def report(self, report: dict[str, Any], tallies: Sequence[Tally]) -> dict[str, Any]:
        """The run's report with the account of the rows that were streamed, which is told in the log too.

        Args:
            report: that of the rows at hand.
            tallies: the counts of each source's rows.
        """
        accounts = []
        for source, tally in zip(self.sources, tallies, strict=True):
            accounts.append(account(source, tally.rows_read(), tally, {}))
            if tally.rows_read():
                tally.tell(source.found.path, "train", {})
        found = [*report["findings"], *(finding.as_json() for finding in self._findings(tallies))]
        return report | {"train": totals(accounts) | {"streamed": True}, "findings": found}

    def _findings(self, tallies: Sequence[Tally]) -> list[Finding]:
        counted = zip(self.sources, tallies, strict=True)
        return findings(
            ((source.found.path, tally.rows_read(), tally) for source, tally in counted), self.config.contract
        )


def stream_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    cache_folder: Path | None = None,
    look_at: Callable[[Sequence[Finding]], None] = enforce,
) -> tuple[RowStream, TokenizedData]:
    """The training sources of a run, open to be streamed, and its evaluation rows, prepared; see `build_datasets`.

    Args:
        look_at: as `RowStream` takes it.
    Raises:
        UserError: a source, template or length is not right; it says what was found and what to change.
    """
    # A copy: the model's own tokenizer is told to pad when answers are made, and a window may be tokenized meanwhile.
    tokenizer = copy.deepcopy(tokenizer)
    digests = known_digests(cache_folder)
    sources, encoder = open_sources(config, tokenizer, context_length, digests)
    at_hand = [source for source in sources if source.side == "eval"]
    data = token_rows(config, tokenizer, at_hand, encoder, digests, cache_folder)
    preparation = Preparation(config, encoder, Path(), finds_repeats=False)
    for hashes in data.hashes():
        preparation.held_out.add(hashes)
    if len(sources) - len(at_hand) > 1 and any(source.weight is None for source in config.train):
        log.warning("the sources of a stream without weights come one after the other; give each a weight to mix them")
    log.info("training rows are streamed: which of them are equal is not known, and counts are told at the end")
    stream = RowStream(config, sources[len(at_hand) :], preparation, look_at)
    data.report.update(stream.report(data.report, stream.start.tallies))
    digests.save()
    return stream, data


def _refuse_others(what: str) -> None:
    raise UserError(f"{what} are not those that were read before; bring the data back, or start another run")


def _checked(rows: Iterable[Row], check: Callable[[], None]) -> Iterator[Row]:
    for row in rows:
        check()
        yield row


def _arrays(packs: Iterable[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """All that packs hold, one after the other."""
    for pack in packs:
        yield from pack.values()


def _pack(rows: Sequence[TokenArrays]) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.concatenate([ids for ids, _ in rows]),
        "labels": np.concatenate([labels for _, labels in rows]),
        "lengths": np.array([len(ids) for ids, _ in rows], dtype=np.int64),
    }


@dataclass(frozen=True)
class Mark:
    """Where a feed stands after a step.

    `place` is that before the window of the step's last pack, of which `given` micro-batches' worth of packs were given
    so far; `tallies` are the counts of each source's rows in the first epoch, as far as they were read for it. `chain`
    stands for the packs of all steps, and `window` for all packs of that window.
    """

    step: int
    given: int
    place: Place
    tallies: tuple[Tally, ...]
    chain: str = START
    window: str | None = None


class StreamFeed(IterableDataset):
    """The packs of a stream as this process's micro-batches, step after step; `src.batches.PackFeed` without a table.

    Packs follow one another across windows and epochs, so that no step needs to be filled.
    """

    def __init__(self, stream: RowStream, split: StepSplit, *, seed: int, steps: int) -> None:
        """
        Args:
            seed: with the numbers of epoch and window, what the order of packs depends on.
            steps: optimizer steps of the run.
        """
        self.stream = stream
        self.split = split
        self.seed = seed
        self.steps = steps
        self.mark = self._start = Mark(0, 0, stream.start, stream.start.tallies)
        self._target = 0

    def __len__(self) -> int:
        """Micro-batches of this process in the whole run."""
        return self.steps * self.split.accumulation_steps

    def go_to(self, step: int) -> None:
        """Choose the step, from 0, that is fed next; the steps between are read and left out."""
        if step < self.mark.step:
            self.mark = self._start
        self._target = step

    def stand_at(self, mark: Mark) -> None:
        """Note the step that was taken last."""
        self.mark = mark

    def steps_left(self) -> int:
        """Steps from the one that is fed next to the end of the run."""
        return max(0, self.steps - max(self._target, self.mark.step))

    def epoch_at(self, step: int) -> float:
        """Epochs that were begun before the present one; how much of it is done is not known."""
        return float(self.mark.place.epoch)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on after the step that was taken last, as plain JSON."""
        mark = self.mark
        return {
            "step": mark.step,
            "given": mark.given,
            "place": mark.place.as_json(),
            "tallies": [tally.as_json() for tally in mark.tallies],
            "chain": mark.chain,
            "window": mark.window,
        }

    def load_state_from(self, path: Path) -> None:
        """Go to where the feed was whose state a file of JSON holds.

        Raises:
            UserError: the file is no state of a feed.
        """
        try:
            self.load_state(read_json_file(path, ANOTHER_CHECKPOINT))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no place in a stream ({in_one_line(error)}); {ANOTHER_CHECKPOINT}") from error

    def load_state(self, content: dict[str, Any]) -> None:
        """Go to where another feed was when it told its state."""
        tallies = tuple(Tally.of_json(tally) for tally in content["tallies"])
        place, chain, window = Place.of_json(content["place"]), content.get("chain", START), content.get("window")
        self.mark = Mark(content["step"], content["given"], place, tallies, chain, window)

    def __iter__(self) -> Iterator[Packs]:
        for step, mark in self.marked_steps():
            self.stand_at(mark)
            yield from step

    def marked_steps(self, halt: Halt | None = None) -> Generator[tuple[list[Packs], Mark], None, None]:
        """This process's micro-batches, step by step from where the feed stands, without end.

        Args:
            halt: what ends the thread that makes a window while the packs of the one before are given. None: a window
                is made when it is asked for.
        Returns:
            A step's micro-batches, and the mark that `stand_at` takes once they train.
        """
        done, target, chain = self.mark.step, self._target, self.mark.chain
        together = 1 if self.split.tokens is not None else self.split.rows
        with contextlib.closing(self._units(self.mark, halt)) as units:
            while True:
                step = []
                for _ in range(self.split.micro_batches):
                    drawn = list(itertools.islice(units, together))
                    step.append([pack for packs, _ in drawn for pack in packs])
                done += 1
                chain = extended(chain, *_arrays(pack for packs in step for pack in packs))
                if done > target:
                    yield list(self.split.share(step)), replace(drawn[-1][1], step=done, chain=chain)

    def _units(self, mark: Mark, halt: Halt | None) -> Generator[tuple[Packs, Mark], None, None]:
        """What micro-batches are made of, in order: single packs, or with a limit of tokens, micro-batches; and the
        mark after each but for its step and chain."""
        given = mark.given
        made = self.stream.windows(mark.place, halt.check if halt else lambda: None)
        with contextlib.closing(Ahead(made, halt) if halt else made) as windows:
            for place, packs, after in windows:
                window = extended(START, *_arrays(packs))
                if given and mark.window not in (None, window):
                    self.stream.tell_others(f"the rows of window {place.window} of epoch {place.epoch} of the stream")
                random = np.random.default_rng([self.seed, place.epoch, place.window])
                lengths = np.array([len(pack["input_ids"]) for pack in packs], dtype=np.int64)
                units = micro_batches(lengths, replace(self.split, rows=1), random) if packs else []
                for unit in units[given:]:
                    given += 1
                    yield [packs[index] for index in unit], Mark(0, given, place, after.tallies, window=window)
                given = 0
