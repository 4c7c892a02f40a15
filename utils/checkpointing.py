"""Checkpoints of a run: complete or absent, newest kept, verified before one is used.

writer = CheckpointWriter(Path("outputs/smol"), keep=2)
with writer.writing(step=100, main=True, expected_bytes=state_bytes(model, optimizer)):
    ...  # files go below writer.staging / "checkpoint-100"
writer.finish()  # a thread hashes and syncs them meanwhile, and puts them in their place
newest = newest_valid_checkpoint(Path("outputs/smol"))
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME

from utils.checkpoint_record import RECORD, damage, size_of, write_record
from utils.errors import UserError
from utils.files import is_write_failure, remove_unfinished, sync
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


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_valid_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; each damaged one before it is told at WARNING.

    Returns:
        None if there is no checkpoint at all.
    Raises:
        UserError: there are some, and all are damaged.
    """
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s is damaged and passed over: %s", checkpoint, problem)
        damaged.append(f"{checkpoint.name}: {problem}")
    if not damaged:
        return None
    raise UserError(
        f"no checkpoint in {run} is as it was written, so there is none to go on from ({' | '.join(damaged)}); bring "
        f"the files back, or start anew, with another --output.name or without the folder {run}"
    )


def valid_checkpoint(run: Path, wanted: Path) -> Path:
    """The checkpoint of a run that was asked for.

    Raises:
        UserError: it is none of this run's, or damaged.
    """
    found = {path.resolve(): path for path in checkpoints(run)}
    checkpoint = found.get(wanted.resolve())
    if checkpoint is None:
        names = ", ".join(str(path) for path in found.values()) or "none"
        raise UserError(
            f"--resume {wanted} is no checkpoint of the run {run}, which has {names}; give one of these, or leave the "
            "path out to take the newest that is whole"
        )
    if problem := _problem(checkpoint):
        raise UserError(
            f"--resume {wanted} is damaged: {problem}; bring the file back, or leave the path out to take the newest "
            "that is whole"
        )
    return checkpoint


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None also for one that nothing can be told of."""
    if (checkpoint / RECORD).exists():
        return damage(checkpoint)
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    log.warning(
        "%s has no %s, as those of older runs have none; it is taken without a check of its files", checkpoint, RECORD
    )
    return None


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Tell of a file in a run directory that the block cannot write, with the checkpoint to go on from.

    Raises:
        UserError: in place of an `OSError` of the block.
    """
    try:
        yield
    except OSError as error:
        run = path.parent
        last = last_checkpoint(run) if run.is_dir() else None
        way_out = (
            f"the last complete checkpoint is {last.name}: mend that, then use --resume"
            if last
            else f"there is no checkpoint yet: mend that, remove {run}, and start again"
        )
        free = f"; {_mib(shutil.disk_usage(run).free)} are free there" if run.is_dir() else ""
        raise UserError(f"{path} could not be written ({error}){free}; {way_out}") from error


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What a first checkpoint takes on the disk, at least: the weights that it holds and the optimizer's state.

    Of a model with adapters these are the weights that train. Of what is sharded the whole counts, as the processes
    write to one disk. State that is held in other tensors, such as one of 8 bits, is left out, as its size does not
    show.
    """
    kept = (weight for weight in model.parameters() if weight.requires_grad or not isinstance(model, PeftModel))
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = [*kept, *(value for value in values if type(value) in (torch.Tensor, DTensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CheckpointWriter:
    """Writes checkpoints aside, then renames them into their run directory, and removes the oldest but a spared one.

    Their files are written while the caller waits, from memory that it will change. What comes after that, hashes, the
    wait for the disk and the rename, is done by a thread; until then the checkpoint is absent.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        """
        Args:
            run: run directory.
            keep: newest checkpoints that stay.
        """
        self.run = run
        self.keep = keep
        self.staging = run / ".checkpoint"
        self.seconds: float | None = None
        """Seconds that the last checkpoint took, from its first file to its place. None: none is in its place yet."""
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.spared: int | None = None
        """The step of a checkpoint that stays, however many are newer."""

    def discard_unfinished(self) -> None:
        """Remove what a run left that was killed while it wrote; the main process alone calls this."""
        shutil.rmtree(self.staging, ignore_errors=True)
        remove_unfinished(self.run)

    @contextlib.contextmanager
    def writing(self, step: int, *, main: bool, expected_bytes: int = 0) -> Iterator[None]:
        """Let the block write `staging`/checkpoint-`step`, then have a thread put it in its place.

        Args:
            step: the optimizer step that the checkpoint holds.
            main: whether this process renames and removes; the others only write, once this one has called `finish`.
            expected_bytes: its size, if the run has no checkpoint yet from which that is known. 0: unknown.
        Raises:
            UserError: the disk is full or will be, or a file cannot be written, of this checkpoint or the one before.
                The earlier checkpoints stay as they were.
        """
        if main:
            self.finish()
            self._check_space(step, expected_bytes)
        started = time.perf_counter()
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if (told := self._given_up(step, error, main=main)) is error:
                raise
            raise told from error
        if main:
            # Not a daemon: the interpreter waits for it, also where an error ends the run.
            self._thread = threading.Thread(target=self._complete, args=(step, started), name="checkpoint")
            self._thread.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is in its place.

        Raises:
            UserError: a file of it cannot be written.
        """
        self.wait()
        self.raise_failure()

    def wait(self) -> None:
        """Wait until the last checkpoint is in its place, or is known not to come there."""
        if self._thread is not None:
            self._thread.join()

    def raise_failure(self) -> None:
        """Raise what has kept the last checkpoint from its place, if that is known yet, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _complete(self, step: int, started: float) -> None:
        try:
            write_record(self.staging / f"checkpoint-{step}", step=step, config=self.run / "config.json")
            self._put_in_place(step)
            self.seconds = time.perf_counter() - started
        except Exception as error:  # noqa: BLE001  whatever it is, it is raised where the run is at
            self._failure = self._given_up(step, error, main=True)
            if self._failure is not error:
                self._failure.__cause__ = error

    def _given_up(self, step: int, error: Exception, *, main: bool) -> Exception:
        """Remove what was written of a checkpoint; the error as a user is told it, if it came from writing."""
        if main:
            shutil.rmtree(self.staging, ignore_errors=True)
        if not is_write_failure(error):
            return error
        last = self._last_before(step)
        free = shutil.disk_usage(self.run).free
        return UserError(
            f"checkpoint {self.run / f'checkpoint-{step}'} could not be written ({error}); {free / 2**20:,.0f} MiB are "
            f"free. The last complete checkpoint is {last.name if last else 'none'}; free some space, then use --resume"
        )

    def _check_space(self, step: int, expected_bytes: int) -> None:
        """Make sure, before anything is written, that the disk takes a checkpoint as large as the last one."""
        self.run.mkdir(parents=True, exist_ok=True)
        last = self._last_before(step)
        needed, free = size_of([last]) if last else expected_bytes, shutil.disk_usage(self.run).free
        if free >= needed:
            return
        spare = [path for path in checkpoints(self.run) if path != last]
        if last and spare:
            names = ", ".join(path.name for path in spare)
            delete = f"{names} may be deleted ({_mib(size_of(spare))}), as the run goes on from {last.name}"
        else:
            delete = f"delete what is not needed beside {self.run}, or give another output.folder"
        raise UserError(
            f"checkpoint {self.run / f'checkpoint-{step}'} could not be written: it needs about {_mib(needed)}, and "
            f"{_mib(free)} are free there; {delete}. The last complete checkpoint is "
            f"{last.name if last else 'none'}; free some space, then use --resume"
        )

    def _last_before(self, step: int) -> Path | None:
        """The newest checkpoint of an earlier step: those of later ones are behind a run that has gone back."""
        return next((path for path in reversed(checkpoints(self.run)) if step_of(path) < step), None)

    def _put_in_place(self, step: int) -> None:
        """Rename the new checkpoint into the run directory, and others out of it before they are removed, so that none
        is there in part at any time.

        Those of later steps go too: the run has gone back behind them, as they are damaged or another was asked for.
        """
        name = f"checkpoint-{step}"
        for later in checkpoints(self.run):
            if step_of(later) >= step:  # of the same one, where a run that went back comes by it again
                later.rename(self.staging / f"replaced-{later.name}")
        (self.staging / name).rename(self.run / name)
        for lines in self.run.glob("*.jsonl"):  # what is logged up to here must outlast a loss of power as well
            sync(lines)
        sync(self.run)
        for old in checkpoints(self.run)[: -self.keep]:
            if step_of(old) != self.spared:
                old.rename(self.staging / old.name)
        shutil.rmtree(self.staging)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
