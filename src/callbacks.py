"""What watches a run: the progress line, metrics.jsonl, and answers that the model gives.

callbacks = [Progress(), MetricsFile(run / "metrics.jsonl")]
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from config.schema import EvaluationConfig
from src.evaluation import answer_conversations, can_answer
from src.formats import Conversation
from utils.checkpointing import writing_to
from utils.files import write_text
from utils.json_text import parse_json
from utils.logging import get_logger

log = get_logger(__name__)


def clock(seconds: float) -> str:
    """A span of time as people write it, such as `45s`, `3m05s` or `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Intervals(TrainerCallback):
    """Logs, saves and evaluates a run that goes on as often as its settings say, and not as its checkpoint was written
    under."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class Progress(TrainerCallback):
    """One line a logged step, the last step included: loss, learning rate, gradient norm, speed, and the time left."""

    def __init__(self) -> None:
        self._start: float | None = None  # when this process took its first step
        self._first_step = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._start is None:
            self._start, self._first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            log.info("step %d/%d  eval loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])
        if "loss" not in logs:
            return
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._start) / max(1, done) * (state.max_steps - state.global_step)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad norm %.3f  %s tokens/s (%s supervised%s)  %s left",
            state.global_step,
            state.max_steps,
            logs["loss"],
            logs["learning_rate"],
            logs.get("grad_norm", float("nan")),
            f"{logs['tokens_per_second']:,.0f}",
            f"{logs['supervised_tokens_per_second']:,.0f}",
            f"; mfu {logs['mfu']:.0%}" if "mfu" in logs else "",
            clock(left),
        )


class MetricsFile(TrainerCallback):
    """Appends each logged step to a file, as a line of JSON; a resumed run first cuts what it will do again.

    That is what comes after its checkpoint's step, and from the line that sums a whole training up: it was written
    after the last checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            cut_lines(self.path, lambda record: record["step"] > state.global_step or "train_runtime" in record)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            self.add({"step": state.global_step, **logs})

    def add(self, record: dict[str, Any]) -> None:
        """Append one record, and see it to the file; a number that is not finite, which JSON has not, is null."""
        shown = {name: value if _is_json(value) else None for name, value in record.items()}
        with writing_to(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(shown) + "\n")


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def cut_lines(path: Path, is_past: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the lines of a file of JSON lines from the first that is past the point that a run goes on from.

    Args:
        path: a file that need not exist; what cannot be read goes too, as a killed run was writing it, or a loss of
            power left it empty, with what is behind it. Where that is not past the point, it is told.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole_lines = text.split("\n")[:-1]  # str.splitlines would also split at line separators within an answer
    records = list(itertools.takewhile(lambda record: record is None or not is_past(record), map(_read, whole_lines)))
    whole = records.index(None) if None in records else len(records)
    if lost := sum(record is not None for record in records[whole:]):
        log.warning("%s: line %d cannot be read, and is removed with %d good one(s) behind it", path, whole + 1, lost)
    if (rest := "".join(f"{line}\n" for line in whole_lines[:whole])) != text:
        with writing_to(path):
            write_text(path, rest)


def _read(line: str) -> dict[str, Any] | None:
    """A line of JSON with a step; None for one that is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    has_step = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if has_step else None


class Answers(TrainerCallback):
    """Answers to the evaluation questions: a few in the log at each evaluation, all compared before and after training.

    The few also go to a file of samples, the share of exact ones to the file of metrics.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: list[Conversation],
        evaluation: EvaluationConfig,
        metrics: MetricsFile,
        samples: Path,
    ) -> None:
        self.tokenizer = tokenizer
        self.conversations = conversations
        self.evaluation = evaluation
        self.metrics = metrics
        self.samples = samples
        self.stops_early: Callable[[], bool] = lambda: False
        """Tells whether the run is over before its last step, and not only interrupted by a signal."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        if not can_answer():
            log.warning("a sharded model gives no answers during training: samples and exact match are left out")
            self.conversations = []
        ends = state.global_step in (0, state.max_steps) or self.stops_early()
        all_of_them = self.evaluation.exact_match and ends
        asked = self.conversations if all_of_them else self.conversations[: self.evaluation.samples]
        if not asked:
            return
        answers = answer_conversations(model, self.tokenizer, asked, max_new_tokens=self.evaluation.max_new_tokens)
        if not state.is_world_process_zero:
            return
        if all_of_them:
            exact = sum(answer.is_exact for answer in answers) / len(answers)
            log.info(
                "step %d/%d  exact match %.3f of %d answers", state.global_step, state.max_steps, exact, len(answers)
            )
            self.metrics.add({"step": state.global_step, "eval_exact_match": exact, "eval_answers": len(answers)})
        cut_lines(self.samples, lambda record: record["step"] >= state.global_step)  # of this run before its resume
        with writing_to(self.samples), open(self.samples, "a", encoding="utf-8") as file:
            for answer in answers[: self.evaluation.samples]:
                log.info("  Q: %s\n  A: %s", answer.prompt, answer.answer)
                file.write(json.dumps({"step": state.global_step, **asdict(answer)}, ensure_ascii=False) + "\n")
