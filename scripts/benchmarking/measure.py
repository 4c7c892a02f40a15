"""One contender measured in this process, and the rate of the device's matrix products.

figures = measure("smolfactory", layout, folder, weights=weights, attention="sdpa", started=time.time())
rate = matrix_rate(case)
"""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Trainer

from config.benchmark import peak_tflops
from scripts.benchmarking.case import Case
from scripts.benchmarking.clock import BatchCounts, Clock, CountingCollator, StepMarks, peak_memory_mib
from scripts.benchmarking.contenders import build_trainer, takes_packs
from scripts.benchmarking.floor import register_floor, train_floor
from scripts.benchmarking.layout import Layout
from scripts.benchmarking.models import arguments, autocast_dtype, build_model, tokenizer, weights_dtype
from src.adapters import count_parameters
from src.packing import IGNORED
from utils import metrics
from utils.distributed import accelerator_name
from utils.metrics import Work

COMPARED_STEPS = 3
"""First steps whose loss and gradient norm are kept for the comparison with other contenders."""


def measure(
    name: str, layout: Layout, folder: Path, *, weights: Path, attention: str, started: float
) -> dict[str, Any]:
    """Train a contender and say how fast that went, over the steps after warmup.

    Args:
        folder: for what a trainer writes; the caller removes it.
        weights: checkpoint for those who need one.
        attention: what TRL's packs are trained with.
        started: when this process was started, in seconds of `time.time`.
    Raises:
        UserError: the machine cannot run this case, or its loss is not finite.
    """
    case, clock = layout.case, Clock(started=started)
    if name == "floor":
        register_floor()
        args, model = arguments(case, folder), build_model(case, weights, attention="sdpa")
        parameters = count_parameters(model)
        work = Work.of(model, parameters)
        run = train_floor(model, layout, args, clock)
        losses, norms = ([value.item() for value in values] for values in (run.losses, run.grad_norms))
        counts, batches_per_step, extra = run.counts, case.accumulation_steps, {}
    else:
        trainer = build_trainer(name, layout, folder, weights=weights, attention=attention)
        model = trainer.model
        parameters = count_parameters(model)
        work = Work.of(model, parameters)
        extra = {} if takes_packs(name) else {"loss_of_first_rows": _loss_of_first_rows(trainer, layout, clock)}
        counts = _train(trainer, clock)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        losses, norms = [line["loss"] for line in lines], [line["grad_norm"] for line in lines]
        batches_per_step = trainer.args.gradient_accumulation_steps
    compared = range(min(COMPARED_STEPS, case.all_steps))
    first = [_sums(counts[step * batches_per_step :][:batches_per_step])["supervised"] for step in compared]
    return {
        **_speed(case, clock, counts[case.warmup_steps * batches_per_step :][: case.steps * batches_per_step], work),
        "seconds_to_first_step": clock.first_step_s,
        "peak_memory_mib": peak_memory_mib(),
        "first_losses": losses[:COMPARED_STEPS],
        "first_grad_norms": norms[:COMPARED_STEPS],
        "first_supervised_tokens": first,
        "last_loss": losses[-1],
        "parameters": parameters,
        "attention": model.config._attn_implementation,
        "rows_at_once": layout.case.micro_batch_rows if takes_packs(name) else layout.padded_rows,
        "micro_batches_per_step": batches_per_step,
        **extra,
    }


def _train(trainer: Trainer, clock: Clock) -> list[BatchCounts]:
    """Train, and say what each micro-batch held."""
    trainer.data_collator = CountingCollator(trainer.data_collator, tokenizer().pad_token_id)
    trainer.add_callback(StepMarks(clock))
    trainer.train()
    return trainer.data_collator.counts


def _loss_of_first_rows(trainer: Trainer, layout: Layout, clock: Clock) -> float:
    """Loss a supervised token, before training, over the rows of the first packed step, as this trainer computes it."""
    began = time.time()
    rows = [trainer.train_dataset[index] for index in range(layout.rows_of_first_step)]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    supervised = torch.tensor(sum(label != IGNORED for row in rows for label in row["labels"]))
    total, at_once = 0.0, trainer.args.per_device_train_batch_size
    trainer.model.train()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for first in range(0, len(rows), at_once):
            batch = trainer._prepare_inputs(trainer.data_collator(rows[first : first + at_once]))
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=supervised.to(trainer.args.device))
            total += loss.item()
    clock.leave_out(time.time() - began)
    return total


def _sums(counts: Sequence[BatchCounts]) -> dict[str, int]:
    names = ("tokens", "supervised", "positions", "pairs")
    return {name: sum(getattr(batch, name) for batch in counts) for name in names}


def _speed(case: Case, clock: Clock, measured: Sequence[BatchCounts], work: Work) -> dict[str, Any]:
    """Figures of the steps after warmup."""
    seconds, sums = clock.seconds()[case.warmup_steps - 1 :], _sums(measured)
    whole = sum(seconds)
    flops = work.of_batch(tokens=sums["tokens"], supervised=sums["supervised"], pairs=sums["pairs"])
    return {
        "steps": len(seconds),
        "seconds_per_step": median(seconds),
        "seconds_per_step_min": min(seconds),
        "seconds_per_step_max": max(seconds),
        "tokens_per_second": sums["tokens"] / whole,
        "supervised_tokens_per_second": sums["supervised"] / whole,
        "tokens_per_step": sums["tokens"] / case.steps,
        "supervised_share": sums["supervised"] / sums["tokens"],
        "padding_share": 1 - sums["tokens"] / sums["positions"],
        "tflops_per_second": flops / whole / 1e12,
    }


def matrix_rate(case: Case) -> dict[str, Any]:
    """TFLOP/s of a large matrix product in the number format that a case computes with, and what its maker states."""
    device, dtype = accelerator_name(), autocast_dtype(case) or getattr(torch, weights_dtype(case))
    stated = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" and dtype == torch.bfloat16 else None
    return {
        "matrix_tflops": metrics.matrix_rate(device, dtype) / 1e12,
        "matrix_dtype": str(dtype).removeprefix("torch."),
        "stated_tflops": stated,
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }
