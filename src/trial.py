"""A trial of a run: its worst micro-batches, an evaluation and a save, as the run itself does them, measured.

    python train.py --config recipe.yaml --trial FOLDER      # what `src.trial_process` starts

All is built as for the run, but in FOLDER, which gets a report of each process; nothing is pushed or tracked. The steps
are `SFTTrainer`'s own, fed with the worst micro-batches that the run's data holds, and then with the run's first steps.
Each process of a run tries its own part, and all of them take the same worst micro-batches at the same time.
"""

import itertools
import os
import shutil
import stat
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import IterableDataset, Subset
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from config.schema import HubConfig, OutputConfig, RunConfig, TrackingConfig
from src.batches import PackMark, Packs
from src.callbacks import Answers
from src.data import token_folder
from src.run import Run
from src.streaming import StreamFeed
from src.trainer import SFTTrainer
from src.worst_batches import KINDS, FoundBatches, tokens_of, worst_evaluation, worst_of_run
from utils.ahead import Halt
from utils.checkpoint_record import size_of
from utils.errors import UserError
from utils.files import write_json
from utils.launch import process_rank
from utils.memory import be_killed_first, resident_bytes, resident_peak_bytes, restart_peak

LOCK = "lock"
"""The file by which a trial's folder is known."""

ORDINARY_STEPS = 8
"""First steps of the run, from whose seconds its time is projected."""

ANSWERED_AT_ONCE = 32
"""Questions that are answered together, by the default of `src.generation.generate`."""

WARM_UP, ORDINARY = "warm-up", "ordinary step"


@dataclass(frozen=True)
class TrialFiles:
    """One process's files in a trial's folder, which all processes of a machine share."""

    folder: Path
    rank: int

    @property
    def recipe(self) -> Path:
        """Written by the process that starts the trial's."""
        return self.folder / f"recipe-{self.rank}.yaml"

    @property
    def log(self) -> Path:
        """What the trial's process says."""
        return self.folder / f"log-{self.rank}.txt"

    @property
    def report(self) -> Path:
        """What it has measured."""
        return self.folder / f"report-{self.rank}.json"


def trial_config(config: RunConfig, folder: Path) -> RunConfig:
    """The settings of a trial: those of the run, in a folder of its own, with the run's prepared data.

    Args:
        folder: empty, or as `src.trial_process` has made it.
    Raises:
        UserError: there is something else in it.
    """
    others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if others and LOCK not in others:
        raise UserError(f"--trial {folder} holds {', '.join(sorted(others)[:3])} already; give it an empty folder")
    saves = config.training.save_every_steps
    return replace(
        config,
        output=OutputConfig(folder=str(folder), name="run"),
        data=replace(config.data, cache_folder=str(token_folder(config.data, config.output))),
        # Within the trial there is one save and one evaluation, at its end.
        training=replace(config.training, save_every_steps=saves and 10**9),
        evaluation=replace(config.evaluation, every_steps=None),
        hub=HubConfig(),
        tracking=TrackingConfig(),
    )


def begin_trial(folder: Path) -> None:
    """Have the trial end, and its folder go, if the process that started it ends, which is known from a pipe that
    closes; and be the first to be killed where memory runs out.

    Args:
        folder: one that `trial_config` has found to be the trial's own.
    """
    be_killed_first()
    TrialFiles(folder, process_rank()).recipe.unlink(
        missing_ok=True
    )  # it has been read, and URLs in it may hold what opens them
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()


def _end_with_parent(folder: Path) -> None:
    os.read(0, 1)  # the other end of the pipe is never written to: this returns when it closes
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


class Phases:
    """Seconds and peaks of memory of one phase after the other, written down as each ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report: dict[str, Any] = {"phases": []}
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Start the peaks and the clock anew; what was since the last phase counts for none."""
        restart_peak()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def end(self, name: str, *, seconds: float | None = None, **more: Any) -> None:
        """Write a phase down, and begin the next.

        Args:
            seconds: None: since the last began.
        """
        cuda = {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            cuda = {
                "cuda_bytes": torch.cuda.max_memory_allocated(),
                "cuda_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        seconds = time.perf_counter() - self._began if seconds is None else seconds
        self.report["phases"].append(
            {"name": name, "seconds": seconds, "resident_bytes": resident_peak_bytes()} | cuda | more
        )
        write_json(self.path, self.report)
        self.begin()


@dataclass(frozen=True)
class TrialStep:
    """A step of a trial: what it is for, and this process's micro-batches."""

    name: str
    micro_batches: list[Packs]


class TrialFeed(IterableDataset):
    """The steps of a trial, as the trainer takes those of a run; to it they are the first of a whole run."""

    def __init__(self, trial: list[TrialStep], *, run_steps: int) -> None:
        """
        Args:
            run_steps: steps of the run, by which the learning rate goes.
        """
        self.trial = trial
        self.steps = max(run_steps, len(trial) + 1)
        self.mark = PackMark()

    def __len__(self) -> int:
        """Micro-batches of this process in the whole run."""
        return self.steps * len(self.trial[0].micro_batches)

    def go_to(self, step: int) -> None:
        """A trial starts at its first step."""

    def stand_at(self, mark: PackMark) -> None:
        """A trial is not resumed."""

    def steps_left(self) -> int:
        """All of them."""
        return self.steps

    def epoch_at(self, step: int) -> float:
        """A trial is in no epoch."""
        return 0.0

    def __iter__(self) -> Iterator[Packs]:
        for micro_batches, _ in self.marked_steps():
            yield from micro_batches

    def marked_steps(self, halt: Halt | None = None) -> Generator[tuple[list[Packs], PackMark], None, None]:
        """Each step's micro-batches; a trial has no order to keep."""
        for step in self.trial:
            yield step.micro_batches, self.mark


class TrialTrainer(SFTTrainer):
    """The run's trainer, fed with the steps of a trial."""

    phases: Phases
    trial_feed: TrialFeed | None = None

    def new_feed(self) -> Any:
        """The steps of the trial, once they are chosen; until then those of the run that it is for."""
        return self.trial_feed or super().new_feed()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.phases.begin()
        super()._save_checkpoint(model, trial)
        self.checkpoints.finish()
        folder = self.checkpoints.run / f"checkpoint-{self.state.global_step}"
        self.phases.end("checkpoint", bytes=size_of([folder]) if self.args.should_save else 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As a run's; an evaluation tells its figures before answers are made."""
        super().log(logs, start_time)
        if "eval_loss" in logs:
            self.phases.end("evaluation")


class TrialSteps(TrainerCallback):
    """Notes each step, and ends training after the last of the trial."""

    def __init__(self, phases: Phases, feed: TrialFeed, *, saves: bool) -> None:
        self.phases = phases
        self.feed = feed
        self.saves = saves

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.phases.end(self.feed.trial[state.global_step - 1].name)
        if state.global_step == len(self.feed.trial):
            control.should_training_stop = True
            control.should_save = self.saves


def steps_of_trial(
    found: FoundBatches, ordinary: list[list[Packs]], *, accumulation_steps: int, all_kinds: bool = False
) -> list[TrialStep]:
    """The worst micro-batches, each as a whole step, and then ordinary steps.

    The first step is one of the worst too, before the optimizer has a state, and counts for no time. A micro-batch that
    is the worst in several ways has one step.

    Args:
        all_kinds: whether it has several all the same: processes that have found their own must take as many steps.
    """
    steps, seen = [], set()
    for kind in KINDS:
        if all_kinds or found.worst[kind] not in seen:
            seen.add(found.worst[kind])
            steps.append(TrialStep(kind, [found.fed[kind]] * accumulation_steps))
    return [TrialStep(WARM_UP, steps[0].micro_batches), *steps, *(TrialStep(ORDINARY, step) for step in ordinary)]


def run_trial(trainer: TrialTrainer, run: Run, config: RunConfig, **export: Any) -> None:
    """Measure what a run costs; the trainer and its model are as before the run's first step.

    Args:
        config: that of the trial.
        export: what `Run.export` is told beside the trainer.
    """
    processes = trainer.args.world_size
    phases = trainer.phases = Phases(TrialFiles(run.path.parent, process_rank()).report)
    phases.end("start", seconds=time.time() - psutil.Process().create_time())
    if torch.cuda.is_available():
        phases.report["cuda_available_bytes"] = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    feed, flat = trainer.new_feed(), trainer.data_collator.flat
    files = resident_bytes("RssFile") or 0
    found = worst_of_run(feed, flat=flat)
    ordinary = [
        step for step, _ in itertools.islice(trainer.new_feed().marked_steps(), min(ORDINARY_STEPS, feed.steps))
    ]
    steps = steps_of_trial(
        found,
        ordinary,
        accumulation_steps=config.training.accumulation_steps,
        all_kinds=processes > 1 and isinstance(feed, StreamFeed),
    )
    trainer.trial_feed = TrialFeed(steps, run_steps=feed.steps)
    phases.report |= {
        "steps": feed.steps,
        "tokens": found.tokens,
        "ordinary_tokens": [tokens_of(step, flat=flat) for step in ordinary],
        "worst": {kind: asdict(demand) | {"packs": len(found.fed[kind])} for kind, demand in found.worst.items()},
        **_choose_evaluation(trainer, config),
        "mapped_bytes": max(0, (resident_bytes("RssFile") or 0) - files),
    }
    trainer.args.eval_on_start = False
    trainer.add_callback(TrialSteps(phases, trainer.trial_feed, saves=config.training.save_every_steps is not None))
    phases.begin()
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.state.max_steps = trainer.state.global_step  # as at the run's end, where all questions are answered
        phases.begin()
        trainer.evaluate_once()
        phases.end("answers")
    run.export(trainer, config.adapter, **export)
    phases.end("result", bytes=size_of([run.path / "model"]) if trainer.args.should_save else 0)


def _choose_evaluation(trainer: TrialTrainer, config: RunConfig) -> dict[str, Any]:
    """Leave the trainer the worst evaluation batches and the longest questions; tell what share of all they are."""
    if trainer.eval_dataset is None:
        return {}
    processes = trainer.args.world_size
    indices, tokens, all_tokens = worst_evaluation(trainer.eval_dataset, trainer.args.eval_batch_size)
    trainer.eval_dataset = Subset(trainer.eval_dataset, indices * processes)  # which share it
    evaluation = config.evaluation
    [answers] = [one for one in trainer.callback_handler.callbacks if isinstance(one, Answers)]
    asked = answers.conversations if evaluation.exact_match else answers.conversations[: evaluation.samples]
    chosen = asked
    if len(asked) > ANSWERED_AT_ONCE * processes:
        chosen = sorted(asked, key=lambda one: -sum(len(str(turn.get("content"))) for turn in one.messages))
        chosen = chosen[: ANSWERED_AT_ONCE * processes]
    between = min(evaluation.samples, len(answers.conversations))
    answers.conversations = chosen
    return {
        "evaluation_tokens": [tokens * processes, all_tokens],
        "answers": {"tried": len(chosen), "at_ends": len(asked), "between": between},
    }
