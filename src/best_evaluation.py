"""Stops a run whose evaluation no longer gets better, and keeps the checkpoint of its best one.

    best = BestEvaluation(patience=3, checkpoints=writer)
    trainer.add_callback(best)
    trainer.train()
    best.step, best.loss

A checkpoint is written at each evaluation that is better than all before, whatever `training.save_every_steps` says.
The evaluation before the first step is not compared: the model that it measures is not a result of the run.
"""

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from utils.checkpointing import CheckpointWriter
from utils.logging import get_logger

log = get_logger(__name__)


class BestEvaluation(TrainerCallback):
    """Remembers the best evaluation of a run, and how many came after it."""

    def __init__(self, patience: int | None, checkpoints: CheckpointWriter) -> None:
        """
        Args:
            patience: evaluations after the best at which the run stops. None: never, and no checkpoint is kept.
            checkpoints: writes those of the run.
        """
        self.patience = patience
        self.checkpoints = checkpoints
        self.step: int | None = None
        self.loss = math.inf
        self.after = 0
        """Evaluations since the best one."""
        self.over = False
        """Whether training is over, so that what is measured then is not compared."""

    @property
    def out_of_patience(self) -> bool:
        """Whether the run is to stop."""
        return self.patience is not None and self.after >= self.patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop a run at once that goes on from where it had stopped, unless it may be more patient now."""
        control.should_training_stop |= self.out_of_patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Compare an evaluation with the best."""
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            log.warning(
                "the evaluation loss of step %d is not finite: the model, or rows of data.eval, make numbers too large "
                "for their format; the result is not to be trusted. Set training.precision=float32, lower "
                "optim.learning_rate, or go back to an earlier checkpoint",
                state.global_step,
            )
        if self.patience is None or self.over or state.global_step == 0:
            return
        if loss < self.loss:
            self.step, self.loss, self.after = state.global_step, loss, 0
            self.checkpoints.spared = self.step
            control.should_save = True
            return
        self.after += 1
        if self.out_of_patience:
            log.info(
                "step %d: the run stops, as %d evaluation(s) were not better than the eval loss of %s",
                state.global_step,
                self.after,
                f"{self.loss:.4f} at step {self.step}" if self.step else "none, which all were not finite",
            )
            control.should_training_stop = control.should_save = True

    def record(self) -> dict[str, Any] | None:
        """The best evaluation for the run's result; None where none is kept, as without patience."""
        return None if None in (self.step, self.patience) else {"step": self.step, "eval_loss": self.loss}

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on, as plain JSON."""
        return {"step": self.step, "loss": self.loss if self.step else None, "after": self.after}

    def load_state(self, content: dict[str, Any]) -> None:
        """Go to where another run was when it told its state."""
        self.step, self.after = content["step"], content["after"]
        self.loss = math.inf if self.step is None else content["loss"]
        self.checkpoints.spared = self.step
