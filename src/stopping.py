"""A run that is asked to end saves after the step under way and leaves, all processes at the same step.

with stoppable(trainer, grace_period_s=30):
    trainer.train()
# StoppedError: a signal came, and a checkpoint of the last step stands
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from utils.logging import get_logger
from utils.signals import AskedToEnd

log = get_logger(__name__)


class StoppedError(Exception):
    """A run was asked to end and has saved.

    Commands exit with 128 and the signal's number, as shells tell of a process that a signal has ended.
    """

    def __init__(self, number: int, step: int) -> None:
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, which is saved; --resume goes on from it"
        )


@contextlib.contextmanager
def stoppable(trainer: Trainer, grace_period_s: float) -> Iterator[None]:
    """Let signals end the training in the block; before its first step they act as they would without this.

    Args:
        trainer: has `checkpoints`, of which the last tells how long it took.
        grace_period_s: seconds from a signal to the end that a process has.
    Raises:
        StoppedError: a signal came to one of the processes.
    """
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    trainer.add_callback(GracePeriod(grace_period_s, lambda: trainer.checkpoints.seconds))
    try:
        yield
        if trainer.args.save_strategy != "no":  # the last step is saved: what is left to do can be done later
            stop.agree()
        if stop.signal:
            stop.wait_for_all()
    finally:
        stop.asked.restore()
    if stop.signal:
        raise StoppedError(stop.signal, trainer.state.global_step)


class StopWhenAsked(TrainerCallback):
    """Saves and stops at the end of the step in which any process was sent a signal.

    The processes agree by one number over a group of the CPU, so that none waits for its device.
    """

    def __init__(self) -> None:
        self.asked = AskedToEnd()
        self.signal = 0
        """The signal that all processes stop for; 0: none."""
        self._group: distributed.ProcessGroup | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.world_size > 1:
            # A group of its own would have torch's half an hour, for which a run hangs whose link is cut.
            on_device = distributed.get_backend() != "gloo"
            timeout = timedelta(seconds=args.ddp_timeout)
            self._group = (
                distributed.new_group(backend="gloo", timeout=timeout) if on_device else distributed.group.WORLD
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.asked.listen()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.agree()
        if self.signal:
            control.should_save = control.should_training_stop = True

    def wait_for_all(self) -> None:
        """Wait for the main process, which may still put the checkpoint in its place: a launcher ends all processes
        when the first leaves."""
        if self._group is not None:
            distributed.barrier(group=self._group)

    def agree(self) -> None:
        """Learn of the signals that all processes were sent, each of which calls this; the greatest number counts."""
        if self._group is None:
            self.signal = self.asked.signal
            return
        number = torch.tensor([self.asked.signal])
        distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group)
        self.signal = int(number)


def too_short_grace(step_s: float, save_s: float, grace_period_s: float, evaluation_s: float = 0.0) -> str | None:
    """What to say of a grace period that is shorter than the time from a signal to the end. None: it is not.

    Args:
        step_s, save_s, evaluation_s: seconds that an optimizer step, a checkpoint and an evaluation take.
    """
    needed = step_s + save_s + evaluation_s
    if needed <= grace_period_s:
        return None
    evaluation = f" + evaluation {evaluation_s:.1f} s" if evaluation_s else ""
    return (
        f"from a signal to the end this run needs up to {needed:.1f} s (step {step_s:.1f} s + checkpoint {save_s:.1f} s"
        f"{evaluation}), more than training.grace_period_s={grace_period_s:g}: it may be killed before it has saved, "
        "and then goes on from its last checkpoint. Give the job more time (Slurm: --signal=USR1@SECONDS; Kubernetes: "
        "terminationGracePeriodSeconds) and set training.grace_period_s to it, or save more often"
    )


class GracePeriod(TrainerCallback):
    """Says once, as soon as step and checkpoint are measured, that they take longer than the grace period.

    Times are taken where the device has been waited for: at logged lines, without evaluations and checkpoints.
    """

    def __init__(self, grace_period_s: float, save_s: Callable[[], float | None]) -> None:
        """
        Args:
            save_s: seconds that the last checkpoint took. None: there is none yet.
        """
        self.grace_period_s = grace_period_s
        self.save_s = save_s
        self._told = False
        self._since: float | None = None
        self._steps = 0
        self._left_out_s = 0.0
        self._evaluation_s = 0.0
        self._last = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._steps += 1
        self._last = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._since is not None:  # not the one before the first step
            self._evaluation_s = self._leave_out()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._leave_out()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if "loss" not in (logs or {}) or self._since is None:
            return
        now = time.perf_counter()
        step_s = (now - self._since - self._left_out_s) / max(1, self._steps)
        self._since, self._last, self._steps, self._left_out_s = now, now, 0, 0.0
        said = too_short_grace(step_s, self.save_s() or 0.0, self.grace_period_s, self._evaluation_s)
        if said and not self._told and state.is_world_process_zero:
            self._told = True
            log.warning("%s", said)

    def _leave_out(self) -> float:
        """Do not count the time since the last event as that of steps."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._left_out_s += seconds
        return seconds
