"""Supervised fine-tuning on transformers' Trainer, with a loss that no split of the batch can change.

The loss is the sum over supervised tokens divided by their number in the whole global step: every process, every
accumulation step. Packs come in an order that depends on the seed alone.

    args = training_arguments(run.path, config.optim, config.training, config.evaluation, config.tracking)
    trainer = SFTTrainer(model=model, args=args, train_packs=data.train, tokenizer=tokenizer)
    trainer.train()
"""

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import TrainingArguments

from config.schema import OptimConfig
from src.activations import offload_activations
from src.adapters import casts_left_to_autocast, layers_without_dropout
from src.attention import tell_borders
from src.attention_choice import check_documents_apart, takes_borders
from src.batches import PackFeed, split_of
from src.checkpoint_hooks import CheckpointHooks
from src.loss import Scored, SupervisedLoss, next_token_targets
from src.noise import noisy_embeddings
from src.number_hooks import NumberHooks
from src.optim import OptimizerHooks
from src.packing import IGNORED, PackCollator, PackedRows
from src.row_order import RowOrder
from src.sharding import sum_gradients_in_float32
from src.step_sums import StepSums, meter_of
from src.steps import Batch, FeedPlace, ReadyStep, ReadySteps
from src.streaming import RowStream, StreamFeed
from utils.checkpointing import CheckpointWriter
from utils.distributed import check_one_gpu
from utils.logging import get_logger
from utils.peers import PatientGroup

log = get_logger(__name__)


def _whole(step: ReadyStep) -> ReadyStep:
    """A step as it was made ready: what torch's DataLoader would collate is collated."""
    return step


def _collators(
    model: PreTrainedModel, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackCollator, PackCollator]:
    """Those of training and of evaluation, whose packs stay rows of their own."""
    told = takes_borders(model)
    flat = model.config._attn_implementation.startswith("flash")
    if flat:
        args.per_device_eval_batch_size = 1  # so that a row of figures still stands for one pack
    training = PackCollator(tokenizer.pad_token_id, flat=told, tells_longest=told)
    return training, PackCollator(tokenizer.pad_token_id, flat=flat, tells_longest=told)


def _token_weighted_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss a supervised token, from each row's summed loss (B,) and supervised tokens (B,)."""
    tokens = int(np.sum(prediction.label_ids))
    return {
        "loss": float(np.sum(prediction.predictions, dtype=np.float64)) / max(1, tokens),
        "supervised_tokens": tokens,
    }


class SFTTrainer(CheckpointHooks, NumberHooks, OptimizerHooks, Trainer):
    """Trainer whose loss is summed over supervised tokens and divided by their number in the global step."""

    loss_is_scaled_for_ga = True
    """Tells Trainer that `compute_loss` divides by the whole accumulated batch already."""

    feed: PackFeed | StreamFeed | None = None
    """Made when training begins; stands at the step that trains."""

    _order_of: Path | None = None  # the checkpoint that the feed was put to, until training begins
    _ready: ReadySteps | None = None  # reads the feed ahead of that

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        train_packs: PackedRows | RowStream,
        eval_packs: PackedRows | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        keep_checkpoints: int = 2,
        tokens_per_micro_batch: int | None = None,
        optim: OptimConfig | None = None,
        score: SupervisedLoss | None = None,
        neftune_alpha: float | None = None,
        activation_offload: bool = False,
        order_settings: Mapping[str, Any] | None = None,
        max_bad_steps: int = 10,
        patience: int | None = None,
    ) -> None:
        """
        Args:
            train_packs, eval_packs: rows as packs; with a stream of them, `args` must have `max_steps`.
            tokens_per_micro_batch: most tokens in a micro-batch, padding included. None: `args` counts its packs.
            keep_checkpoints: newest checkpoints kept on disk.
            optim: what `args` was made from, of which Muon, LoRA+ and the length of a decay are read. None: defaults.
            score: what is minimized. None: the negative log-likelihood.
            neftune_alpha, activation_offload: as the settings of these names; see `src.noise`, `src.activations`.
            order_settings: what of the run's settings decides which rows a step learns; see `src.row_order`.
            max_bad_steps, patience: when bad numbers, or worse evaluations, end the run; see `src.number_hooks`.
        Raises:
            UserError: several GPUs are visible to one process.
        """
        collator, self._eval_collator = _collators(model, args, tokenizer)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_packs,
            eval_dataset=eval_packs,
            processing_class=tokenizer,
            compute_metrics=_token_weighted_loss,
            callbacks=list(callbacks),
        )
        check_one_gpu(args.n_gpu)
        self.optim = optim or OptimConfig()
        self.model_accepts_loss_kwargs = True  # Trainer's word for: the loss is not divided by accumulation again
        self.score = score or SupervisedLoss()
        self.neftune_alpha = neftune_alpha
        self.activation_offload = activation_offload
        self.checkpoints = CheckpointWriter(Path(args.output_dir), keep=keep_checkpoints)
        self._split = split_of(args, tokens_per_micro_batch)
        self.order = RowOrder(dict(order_settings or {}) | {"processes": args.world_size})
        self._patience = PatientGroup()
        sum_gradients_in_float32(self)
        self.add_callback(FeedPlace(lambda: self.feed))
        self.remove_callback(PrinterCallback)  # the run's own callbacks print
        self._adapted = layers_without_dropout(model) if args.bf16 or args.fp16 else []
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.sums = StepSums(meter_of(self.model, args, whole=whole), device=args.device)
        self.watch_from(max_bad_steps=max_bad_steps, patience=patience)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As Trainer's, after a check that the model keeps the documents of a pack apart.

        Raises:
            UserError: it does not, or numbers went bad as `src.number_hooks` says.
        """
        if self.train_dataset.packs_rows() and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            with self.accelerator.autocast():
                check_documents_apart(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            self.checkpoints.discard_unfinished()
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint is None:
            self.feed = self.new_feed()
        elif checkpoint != self._order_of:
            self.restore_order(checkpoint)
        self._order_of = None
        self.args.max_steps = self.feed.steps
        self._ready = self._new_steps()
        self.sums.take_unseen()
        self.begin_numbers(resume_from_checkpoint)
        self._patience.wait()  # each has prepared its data and read its model by itself
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self.checkpoints.finish()
        except RuntimeError as error:
            error.add_note(f"in step {self.state.global_step + 1}")
            raise
        finally:
            self._ready.close()
            self.checkpoints.wait()
        self.check_numbers_at_end()
        return result

    def restore_order(self, checkpoint: Path) -> None:
        """Go to where a checkpoint stands in the data, before anything is written for the run that goes on.

        Raises:
            UserError: the rows before it are others now; see `src.row_order`.
        """
        self.feed = self.new_feed()
        self.order.restore(checkpoint, self.feed)
        self._order_of = checkpoint

    def new_feed(self) -> PackFeed | StreamFeed:
        """The micro-batches of the whole run, from its first one on."""
        seed, max_steps = self.args.data_seed, self.args.max_steps if self.args.max_steps > 0 else None
        if isinstance(self.train_dataset, RowStream):
            return StreamFeed(self.train_dataset, self._split, seed=seed, steps=max_steps)
        epochs = self.args.num_train_epochs
        return PackFeed(self.train_dataset, self._split, seed=seed, epochs=epochs, max_steps=max_steps)

    def _new_steps(self) -> ReadySteps:
        return ReadySteps(
            self.feed,
            self.data_collator,
            functools.partial(self.sums.meter.count, pad_id=self.data_collator.pad_token_id),
            device=self.args.device,
            pins=self.args.dataloader_pin_memory,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Steps of this process's micro-batches, each made while those before train; none is prepared by Accelerate,
        which would split them over processes a second time. Its length is in micro-batches, as Trainer needs it."""
        return DataLoader(
            self._ready,
            batch_size=None,
            collate_fn=_whole,
            generator=torch.Generator(),  # else each iterator draws from the generator that dropout is drawn from
        )

    def get_eval_dataloader(self, eval_dataset: PackedRows | None = None) -> DataLoader:
        """Batches of packs that stay rows of their own, as each has its own figures."""
        loader = DataLoader(
            eval_dataset or self.eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self._eval_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # as above: how often a run is evaluated must not change its dropout
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """The micro-batches of one optimizer step, and the supervised tokens of all processes' together.

        Nothing here waits for the device: what is on the host is copied from pinned memory, and how many tokens the
        processes have together stays on the device until a line is logged or a checkpoint saved.

        None are left for a run that goes on from its last step, or from where it had stopped early: Trainer alone would
        take one more.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], torch.zeros((), dtype=torch.int64, device=device)
        self.checkpoints.raise_failure()
        step: ReadyStep = next(epoch_iterator)
        assert len(step.batches) == num_batches, "a run has whole steps only"
        self.feed.stand_at(step.mark)
        self.recent.keep(self.state.global_step + 1, step.batches)
        batches = [self._on_device(batch) for batch in step.batches]
        counts = self.accelerator.reduce(send_to_device(step.counts, device, non_blocking=True), reduction="sum")
        self.sums.begin_step(counts, step.counted)
        return batches, counts[0]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's, both passes of one micro-batch, without casts that autocast takes back, and while activations
        wait where they are told to."""
        waiting = self._offload if self.activation_offload else contextlib.nullcontext()
        with casts_left_to_autocast(self._adapted), waiting:
            loss = super().training_step(*args, **kwargs)
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)  # Trainer's own mean of all steps stays one

    @functools.cached_property
    def _offload(self) -> contextlib.AbstractContextManager:
        """Made at the first step: parameters, which stay on the device, are where they will be then."""
        return offload_activations(self.model)

    def _on_device(self, batch: Batch) -> Batch:
        moved = send_to_device(batch, self.args.device, non_blocking=True)
        if self.args.device.type != "cpu":
            tell_borders(moved["document_borders"], batch["document_borders"].tolist())
        return moved

    def _update_tokens_seen(self) -> None:
        """Bring the state's tokens up to date, for which the device is waited for."""
        self.state.num_input_tokens_seen += self.sums.take_unseen()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed loss over the global step's supervised tokens, times the processes, whose gradients are averaged.

        Only the routers' auxiliary loss depends on how the step is split into micro-batches; see `src.router_loss`.
        """
        with noisy_embeddings(self.accelerator.unwrap_model(model), inputs, self.neftune_alpha):
            scored = self.score(model, inputs)
        nll = scored.nll.sum()
        routers = torch.zeros_like(nll) if scored.router is None else scored.router * len(scored.nll)
        sums = torch.stack((scored.total, nll, routers))
        loss, nll, routers = sums * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        self.sums.add_loss(torch.stack((nll, loss, routers)))
        return self.guard.marked(loss)

    def score_again(self, batch: Batch) -> Scored:
        """Score a batch of the host as a training step does, by the model without its wrapper."""
        model, moved = self.accelerator.unwrap_model(self.model), self._on_device(batch)
        with (
            self.compute_loss_context_manager(),
            casts_left_to_autocast(self._adapted),
            noisy_embeddings(model, moved, self.neftune_alpha),
        ):
            return self.score(model, moved)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Each row's summed loss and supervised tokens, both (B,), from which the exact mean is made at the end."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), casts_left_to_autocast(self._adapted):
            scored = self.score(model, inputs)
        nll_B = scored.nll.new_zeros(len(inputs["input_ids"])).index_add_(0, scored.row, scored.nll)
        tokens_B = (next_token_targets(inputs["labels"]) != IGNORED).sum(dim=1)
        return None, nll_B, tokens_B

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the loss unrounded, and the speed since the last training line, over all processes."""
        self._update_tokens_seen()
        is_training_line = "loss" in logs
        if is_training_line:
            speed = self.sums.speed()  # before a bad step is looked into
            self.watch_numbers()
            logs |= self.numbers.line()
            if self.score.objective.plain and not self.score.router:
                del logs["objective"]
            if not self.score.router:
                del logs["router_aux_loss"]
            logs |= speed | {"tokens": self.state.num_input_tokens_seen, "batches": self.feed.mark.chain}
            self.sums.clear()
        super().log(logs, start_time)
        if is_training_line:
            self.stop_on_bad_numbers()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; the time is not counted against training speed.

        Returns:
            `eval_loss`, the mean over supervised tokens in nats, and `eval_supervised_tokens`, among Trainer's figures.
        """
        paused = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.sums.leave_out(time.perf_counter() - paused)
        return metrics

    def evaluate_once(self) -> None:
        """Evaluate at the last step, unless that was done already."""
        done = (line["step"] == self.state.global_step for line in self.state.log_history if "eval_loss" in line)
        if not any(done):
            self.evaluate()

    def first_batches(self, number: int) -> list[Batch]:
        """The first micro-batches of this process in a run that starts, on its device, at most so many."""
        batches: list[Batch] = []
        for packs in self.new_feed():
            batches.append(self._on_device(self.data_collator(packs)))
            if len(batches) == number:
                break
        return batches
