"""Checkpoints of a run: complete or absent, newest kept.

writer = CheckpointWriter(Path("outputs/smol"), keep=2)
with writer.writing(step=100, main=True):
    ...  # files go below writer.staging / "checkpoint-100"
newest = last_checkpoint(Path("outputs/smol"))
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from utils.errors import UserError
from utils.files import is_write_failure, sync, sync_tree
from utils.logging import get_logger

log = get_logger(__name__)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, by step, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run directory, or None."""
    return next(reversed(checkpoints(run)), None)


_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointWriter:
    """Writes checkpoints aside, then renames them into their run directory, and removes the oldest."""

    def __init__(self, run: Path, *, keep: int) -> None:
        """
        Args:
            run: run directory.
            keep: newest checkpoints that stay.
        """
        self.run = run
        self.keep = keep
        self.staging = run / ".checkpoint"

    def discard_unfinished(self) -> None:
        """Remove what a run left that was killed while it wrote a checkpoint; the main process alone calls this."""
        shutil.rmtree(self.staging, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, step: int, *, main: bool) -> Iterator[None]:
        """Let the block write `staging`/checkpoint-`step`, then put it in its place.

        Args:
            step: the optimizer step that the checkpoint holds.
            main: whether this process renames and removes; the others only write.
        Raises:
            UserError: the disk is full, or a file cannot be written. The earlier checkpoints stay as they were.
        """
        name = f"checkpoint-{step}"
        try:
            yield
            if main:
                sync_tree(self.staging / name)
                self._put_in_place(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            if main:
                shutil.rmtree(self.staging, ignore_errors=True)
            if not is_write_failure(error):
                raise
            last = last_checkpoint(self.run)
            free = shutil.disk_usage(self.run).free
            raise UserError(
                f"checkpoint {self.run / name} could not be written ({error}); {free / 2**20:,.0f} MiB are free. The "
                f"last complete checkpoint is {last.name if last else 'none'}; free some space, then use --resume"
            ) from error

    def _put_in_place(self, name: str) -> None:
        """Rename the new checkpoint into the run directory, and the old ones out of it before they are removed, so that
        none is there in part at any time."""
        target = self.run / name
        if target.exists():  # a run that went back to an earlier checkpoint comes by this step again
            target.rename(self.staging / "replaced")
        (self.staging / name).rename(target)
        sync(self.run)
        for old in checkpoints(self.run)[: -self.keep]:
            old.rename(self.staging / old.name)
        shutil.rmtree(self.staging)
