"""What SFTTrainer does when numbers go bad: it leaves steps out, tells which rows and which module, and stops in time.

    class SFTTrainer(NumberHooks, OptimizerHooks, Trainer):  # calls watch_from(...) once it is made
        ...

The device alone decides whether a step is left out (`src.step_guard`). The host reads it when a line is logged or a
checkpoint saved (`src.number_watch`), and then looks into the step (`src.diagnosis`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import OptimizerNames, TrainingArguments

from src.bad_modules import bad_weights
from src.best_evaluation import BestEvaluation
from src.callbacks import cut_lines
from src.diagnosis import Diagnosis, sentence
from src.number_watch import Event, NumberWatch
from src.step_guard import StepGuard
from src.step_rows import RecentSteps
from utils.checkpoint_record import damage
from utils.checkpointing import last_checkpoint
from utils.errors import UserError
from utils.json_text import ANOTHER_CHECKPOINT, read_json_file
from utils.logging import get_logger

log = get_logger(__name__)

NUMBERS = "numbers.json"
"""A checkpoint's file that says what was counted up to it."""

BAD_BATCHES = "bad_batches.jsonl"
"""A run's file of the steps that were looked into."""

NAMED = 8
"""Most weights that are named in a message."""

EVENTS_TOLD = 20
"""Most events of a run that are looked into, as each takes the time of a few steps; more are counted."""


class NumberHooks:
    """The methods of SFTTrainer that watch its numbers."""

    def watch_from(self, *, max_bad_steps: int, patience: int | None) -> None:
        """Begin to watch; to be called once the trainer is made.

        Args:
            max_bad_steps: steps in a row that may be left out.
            patience: evaluations after the best at which the run stops. None: never.
        """
        optimizer = OptimizerNames(self.args.optim).value
        within_backward = optimizer.endswith("_layerwise") or optimizer in ("lomo", "adalomo")
        self.guard = StepGuard(
            self.args.device,
            scaled=self.args.fp16,
            leaves_out=not (within_backward or self.is_deepspeed_enabled),
        )
        self.numbers = NumberWatch(max_bad_steps=max_bad_steps, scaled=self.args.fp16)
        self.best = BestEvaluation(patience, self.checkpoints)
        self.recent: RecentSteps | None = None  # made when training begins
        self._events = 0
        self._bad_at_start: list[str] = []
        for callback in (self.guard, self.best, _FirstLook(self._note_first_weights)):
            self.add_callback(callback)

    def begin_numbers(self, checkpoint: str | None) -> None:
        """Go to where the numbers of a checkpoint were; a run that starts, and an older checkpoint, have none."""
        self.recent = RecentSteps(self.feed, self.data_collator)
        file = Path(checkpoint) / NUMBERS if checkpoint else None
        if file and file.is_file():
            content = read_json_file(file, ANOTHER_CHECKPOINT)
            self.numbers.load_state(content["watch"])
            self.best.load_state(content["best"])
            self._events = content["events"]

    def save_numbers(self, folder: Path) -> None:
        """Write what `begin_numbers` needs into a checkpoint."""
        content = {"watch": self.numbers.state(), "best": self.best.state(), "events": self._events}
        (folder / NUMBERS).write_text(json.dumps(content), encoding="utf-8")

    def _note_first_weights(self, step: int) -> None:
        """Tell which weights are not finite before the first step, as a checkpoint with these may be saved again."""
        if self.args.should_save:
            cut_lines(self._bad_batches, lambda record: record["step"] > step)
        self._bad_at_start = bad_weights(self._inner())
        if self._bad_at_start:
            log.warning(
                "weights that are not finite before the first step: %s; rows that need them cannot be trained on. Load "
                "a checkpoint that is whole",
                ", ".join(self._bad_at_start[:NAMED]),
            )

    @property
    def _bad_batches(self) -> Path:
        return Path(self.args.output_dir) / BAD_BATCHES

    def _inner(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """As Trainer's; the guard sees the norm."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.see_gradient(norm)
        return norm

    def watch_numbers(self) -> None:
        """Read the steps since this was last called, and tell what is bad of them; the device is waited for.

        Every process calls this together.
        """
        figures = self.sums.take_steps(self.accelerator, self.guard.take())
        for event in self.numbers.take(self.state.global_step, figures):
            self._events += 1
            if self._events <= EVENTS_TOLD:
                self._tell(event)
            elif self._events == EVENTS_TOLD + 1:
                log.warning("step %d too; from here on such steps are counted, and not looked into", event.step)

    def _tell(self, event: Event) -> None:
        """Look into an event, log it, and append it to the run's file of them."""
        decode = self.processing_class.decode
        record = Diagnosis(
            self._inner(),
            self.score_again,
            self.recent,
            self.data_collator,
            decode,
            processes=self.accelerator.num_processes,
            sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        ).of(event)
        if not self.args.should_save:
            return
        log.warning("%s", sentence(record))
        self._bad_batches.parent.mkdir(parents=True, exist_ok=True)
        with open(self._bad_batches, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def stop_on_bad_numbers(self, *, saves: bool = False) -> None:
        """End the run if it must; every process calls this together.

        Args:
            saves: whether the weights are about to be saved, and so are looked at even if no step was bad.
        Raises:
            UserError: weights are spoiled, or more steps in a row were left out than may be.
        """
        if saves or self.numbers.in_a_row:
            self._stop_if_spoiled()
        if self.numbers.too_many:
            raise UserError(
                f"the loss or the gradient was not finite in {self.numbers.in_a_row} step(s) in a row, up to step "
                f"{self.state.global_step}, and training.max_bad_steps={self.numbers.max_bad_steps} allows no more; "
                f"{BAD_BATCHES} names rows and module. They were left out, so no weight is spoiled. {self._way_out()}"
            )

    def _stop_if_spoiled(self) -> None:
        """
        Raises:
            UserError: a weight is not finite that was so when training began, in any process, or a bad step could not
                be left out.
        """
        spoiled = [name for name in bad_weights(self._inner()) if name not in self._bad_at_start]
        if self.numbers.in_a_row and not self.guard.leaves_out:
            spoiled = spoiled or ["all that the optimizer updates within the backward pass"]
        flag = torch.tensor(float(bool(spoiled)), device=self.args.device)
        if float(self.accelerator.reduce(flag)):
            raise UserError(
                f"the loss stopped being finite by step {self.state.global_step}; the weights are spoiled and unsaved"
                f" ({', '.join(spoiled[:NAMED]) or 'those of another process'}). {self._way_out()}"
            )

    def _way_out(self) -> str:
        self.checkpoints.wait()  # the last one may be on its way to its place
        last = last_checkpoint(Path(self.args.output_dir))
        change = "a lower optim.learning_rate, a longer warmup, or training.precision=float32"
        if last is None:
            return f"There is no checkpoint yet: look at the rows, then start again with {change}"
        return f"The last good checkpoint is {last.name}: look at the rows, then use --resume with {change}"

    def check_numbers_at_end(self) -> None:
        """
        Raises:
            UserError: every step of the run was left out.
        """
        self.watch_numbers()
        if self.numbers.skipped and self.numbers.skipped >= self.state.global_step:
            raise UserError(
                f"the loss or the gradient was not finite in any of {self.numbers.skipped} step(s), so all were skipped"
                f" and nothing was learned; {BAD_BATCHES} names rows and module. {self._way_out()}"
            )

    def keep_best(self) -> None:
        """Put the weights of the best evaluation into the model, if a patience is set and they are not there, and
        measure them.

        Raises:
            UserError: the checkpoint that holds them is damaged.
        """
        self.best.over = True
        if self.best.patience is None or self.best.step in (None, self.state.global_step):
            return
        self.accelerator.wait_for_everyone()  # for the main process, which puts checkpoints in their place
        folder = Path(self.args.output_dir) / f"checkpoint-{self.best.step}"
        if problem := damage(folder):
            raise UserError(
                f"{folder} holds the best evaluation and is damaged: {problem}; bring the file back and use --resume, "
                "or leave out evaluation.patience to export the last weights"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.state.best_model_checkpoint = str(folder)
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(folder))
        log.info(
            "the result has the weights of step %d, whose eval loss of %.4f was the best, and not those of step %d",
            self.best.step,
            self.best.loss,
            self.state.global_step,
        )
        self.evaluate()


class _FirstLook(TrainerCallback):
    """Has the trainer look at its weights before the first step."""

    def __init__(self, look: Callable[[int], None]) -> None:
        """
        Args:
            look: is told the steps that were taken before.
        """
        self.look = look

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the look, once weights are loaded."""
        self.look(state.global_step)
