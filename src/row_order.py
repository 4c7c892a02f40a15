"""Which rows a run has trained on, in which order: kept with each checkpoint, and checked when a run goes on.

order = RowOrder(row_order_settings(to_dict(config)) | {"processes": 2})
order.write(checkpoint, feed)
order.restore(checkpoint, feed)      # puts the feed there, or says that the rows are others now

The chain of a feed stands for all rows up to a step. That of prepared rows is computed again from the data and the
settings, without reading a row: it shows other places or lengths of rows. Rows of a stream are read again up to the
step, and compared by their content.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.batches import PackFeed, PackMark
from src.streaming import StreamFeed
from utils.checkpointing import step_of
from utils.errors import UserError
from utils.json_text import ANOTHER_CHECKPOINT, read_json_file
from utils.logging import get_logger

log = get_logger(__name__)

ORDER = "order.json"
"""A checkpoint's file with the chain of its rows, and the settings under which they came in that order."""

STREAM = "stream.json"
"""A checkpoint's file that says where the stream of rows stands."""


class RowOrder:
    """The order of a run's rows: what its checkpoints say of it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """
        Args:
            settings: what decides which rows a step learns, by name, as JSON's own types.
        """
        self.settings = json.loads(json.dumps(settings))
        self._since = PackMark()  # from here on, rows have the order of these settings

    def write(self, checkpoint: Path, feed: PackFeed | StreamFeed) -> None:
        """Write what `restore` needs into a checkpoint's folder."""
        content = {"chain": feed.mark.chain, "since": asdict(self._since), "settings": self.settings}
        (checkpoint / ORDER).write_text(json.dumps(content), encoding="utf-8")
        if isinstance(feed, StreamFeed):
            (checkpoint / STREAM).write_text(json.dumps(feed.state()), encoding="utf-8")

    def restore(self, checkpoint: Path, feed: PackFeed | StreamFeed) -> None:
        """Put a feed where it stood when a checkpoint was written.

        Rows that come in another order than before are told at WARNING, with the settings that have changed; the run
        then takes up the new order at this step. The rows of a stream are compared once they are read.

        Raises:
            UserError: they do, and no setting that orders them has changed; the run ends before the checkpoint; or it
                is streamed now and was not then.
        """
        step, path = step_of(checkpoint), checkpoint / ORDER
        if step > feed.steps:
            raise UserError(
                f"{checkpoint.name} stands behind the end of the run, which has {feed.steps:,} step(s) by its settings;"
                f" raise training.max_steps or training.epochs to more than {step:,} steps, or go on from an earlier "
                f"checkpoint by --resume {checkpoint.parent}/checkpoint-N"
            )
        content = read_json_file(path, ANOTHER_CHECKPOINT) if path.is_file() else None
        if content is None:
            log.warning(
                "%s has no %s, as those of older runs have none; the order of rows is not checked", checkpoint, ORDER
            )
        if isinstance(feed, StreamFeed):
            if not (checkpoint / STREAM).is_file():
                raise UserError(
                    f"{checkpoint.name} has no {STREAM}, as its rows were not streamed; give data.streaming=False, or "
                    "start another run by --output.name NAME"
                )
            settings = content["settings"] if content else None
            feed.stream.tell_others = lambda what: self._tell_others(what, checkpoint, settings)
            feed.load_state_from(checkpoint / STREAM)
            return
        if content is None:
            feed.go_to(step)
            return
        self._since, chain = PackMark(**content["since"]), content["chain"]
        found = feed.chain_at(step, self._since)
        if found != chain:
            self._tell_others(f"the rows up to step {step} (chain {found})", checkpoint, content["settings"])
            self._since = PackMark(step, chain)
        feed.stand_at(PackMark(step, chain))

    def _tell_others(self, what: str, checkpoint: Path, settings: Mapping[str, Any] | None) -> None:
        """Refuse other rows than those of a checkpoint, unless the settings explain them."""
        before = settings if settings is not None else self.settings
        changed = sorted(
            name for name in before.keys() | self.settings.keys() if before.get(name) != self.settings.get(name)
        )
        if not changed:
            raise UserError(
                f"{what} are not those that {checkpoint.name} was trained on, and no setting that orders them has "
                "changed: the data has, or what prepares it. Bring the data back (the run's data.json has the digests "
                "of its files), start another run by --output.name NAME, or give another training.seed to go on all "
                "the same, with these rows in a new order"
            )
        log.warning(
            "%s are not those that %s was trained on, as %s changed; some rows may be trained twice and others never "
            "in this epoch, and the result is not that of a run with one order",
            what,
            checkpoint.name,
            ", ".join(f"{name} ({before.get(name)!r} -> {self.settings.get(name)!r})" for name in changed),
        )
