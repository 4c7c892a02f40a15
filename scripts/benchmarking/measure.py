"""One case measured in this process: the project's own trainer on packs, or transformers' on padded rows.

figures = measure(case, folder)  # {"tokens_per_second": ..., "peak_memory_mib": ..., ...}
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from config.benchmark import SHAPES, peak_tflops
from config.schema import AdapterConfig, EvaluationConfig, ModelConfig, OptimConfig, TrackingConfig, TrainingConfig
from scripts.benchmarking.case import Case
from scripts.benchmarking.flops import Work
from scripts.benchmarking.rows import FIRST_ID, rows_needed, synthetic_rows
from src.adapters import add_adapter, count_parameters
from src.loss import next_token_targets
from src.model import load_model, load_settings, recompute_activations
from src.packing import IGNORED, PackedRows
from src.trainer import SFTTrainer, training_arguments
from utils.distributed import accelerator_name


@dataclass(frozen=True)
class BatchCounts:
    """What one micro-batch holds."""

    tokens: int
    supervised: int
    positions: int
    """Tokens and padding."""
    pairs: int
    """Of a token and one that it sees: itself and those before it in its document."""

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor], pad_token_id: int) -> "BatchCounts":
        """
        Args:
            batch: `input_ids`, `labels` (B, L), and either `position_ids`, which start at 0 with each document, or
                none, where each row is one document.
        """
        ids_BL = batch["input_ids"].numpy()
        real_BL = ids_BL != pad_token_id
        positions_BL = batch.get("position_ids")
        if positions_BL is None:
            positions_BL = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)
        # A token at place p of its document sees p + 1 tokens.
        pairs = int((np.asarray(positions_BL)[real_BL] + 1).sum())
        supervised = int((next_token_targets(batch["labels"]) != IGNORED).sum())
        return cls(int(real_BL.sum()), supervised, ids_BL.size, pairs)


@dataclass
class CountingCollator:
    """A trainer's own collator, with an account of what it made, in order."""

    collator: Any
    pad_token_id: int
    counts: list[BatchCounts] = field(default_factory=list)

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        self.counts.append(BatchCounts.of(batch, self.pad_token_id))
        return batch


class StepClock(TrainerCallback):
    """When each optimizer step ended on the device, without making it wait: loading and logging count as well."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds from the end of each step to that of the next: one fewer than steps."""
        if not torch.cuda.is_available():
            return [after - before for before, after in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._marks)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of special tokens alone: rows are ids from the start."""
    words = {"<pad>": 0, "<s>": 1, "</s>": FIRST_ID - 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")), pad_token="<pad>", eos_token="</s>"
    )


def build_model(case: Case, folder: Path) -> PreTrainedModel | PeftModel:
    """The case's model with random weights, made on the device that trains it.

    Args:
        folder: where the checkpoint is written that 4-bit weights are loaded from.
    Raises:
        UserError: the attention or the quantization is not to be had here.
    """
    dtype = case.dtype if case.dtype != "auto" else ("float32" if case.method == "full" else "bfloat16")
    attention = "auto" if case.method == "qlora" else case.attention
    config = ModelConfig(architecture=SHAPES[case.model], dtype=dtype, attention=attention)
    words = tokenizer()
    torch.manual_seed(case.seed)
    with torch.device(accelerator_name()):
        model = load_model(config, load_settings(config, words), words, trains_all=case.method == "full")
    if case.method == "qlora":
        model.save_pretrained(folder / "weights")
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        config = ModelConfig(path=str(folder / "weights"), quantization="nf4", dtype=dtype, attention=case.attention)
        model = load_model(config, load_settings(config, words), words, trains_all=False)
    if case.gradient_checkpointing:
        recompute_activations(model)
    adapter = AdapterConfig() if case.method == "full" else AdapterConfig(kind="lora", rank=case.rank)
    return add_adapter(model, adapter)


def build_trainer(case: Case, model: PreTrainedModel | PeftModel, folder: Path) -> tuple[Trainer, CountingCollator]:
    """A trainer with the case's rows, and the account of its batches."""
    words = tokenizer()
    args = training_arguments(
        folder,
        OptimConfig(name=case.optimizer, learning_rate=1e-4, schedule="constant"),
        TrainingConfig(
            max_steps=case.warmup_steps + case.steps,
            micro_batch_rows=case.micro_batch_rows,
            accumulation_steps=case.accumulation_steps,
            precision=case.precision,
            seed=case.seed,
            log_every_steps=1,
            save_every_steps=None,
        ),
        EvaluationConfig(),
        TrackingConfig(),
        autocasts=case.dtype != "float16",
    )
    rows = synthetic_rows(case, SHAPES[case.model]["vocab_size"], rows_needed(case))
    if case.trainer == "plain":
        padding = DataCollatorForSeq2Seq(words, label_pad_token_id=IGNORED)
        trainer = Trainer(model=model, args=args, data_collator=padding, train_dataset=rows, processing_class=words)
    else:
        packs = PackedRows(rows, max_length=case.max_length, packing=case.packing)
        trainer = SFTTrainer(model=model, args=args, tokenizer=words, train_packs=packs)
    trainer.data_collator = CountingCollator(trainer.data_collator, words.pad_token_id)
    return trainer, trainer.data_collator


def measure(case: Case, folder: Path, *, peak: float | None = None) -> dict[str, Any]:
    """Train a case and say how fast that went, over the steps after warmup.

    Args:
        folder: for what the trainer writes; the caller removes it.
        peak: TFLOP/s of the device at best; None: as config/benchmark.py has it, for bf16.
    Raises:
        UserError: the machine cannot run this case, or its loss is not finite.
    """
    model = build_model(case, folder)
    parameters, work = count_parameters(model), Work.of(model)
    trainer, batches = build_trainer(case, model, folder)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    seconds = clock.seconds()[case.warmup_steps - 1 :]
    measured = batches.counts[case.warmup_steps * case.accumulation_steps :][: case.steps * case.accumulation_steps]
    tokens = sum(counts.tokens for counts in measured)
    supervised = sum(counts.supervised for counts in measured)
    flops = work.of_batch(tokens=tokens, supervised=supervised, pairs=sum(counts.pairs for counts in measured))
    if peak is None and trainer.args.bf16 and torch.cuda.is_available():
        peak = peak_tflops(torch.cuda.get_device_name())
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "steps": len(seconds),
        "seconds_per_step": median(seconds),
        "seconds_per_step_min": min(seconds),
        "seconds_per_step_max": max(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "supervised_tokens_per_second": supervised / sum(seconds),
        "tokens_per_step": tokens / case.steps,
        "supervised_share": supervised / tokens,
        "padding_share": 1 - tokens / sum(counts.positions for counts in measured),
        "tflops_per_second": flops / sum(seconds) / 1e12,
        "peak_tflops": peak,
        "mfu": flops / sum(seconds) / 1e12 / peak if peak else None,
        "peak_memory_mib": peak_memory_mib(),
        "memory": "cuda" if torch.cuda.is_available() else "resident",
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parameters": parameters,
        "attention": model.config._attn_implementation,
        "weights": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "autocast": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else None,
    }


def peak_memory_mib() -> int:
    """Most memory in use while training: what torch held on the GPU, or the resident size of this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
