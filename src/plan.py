"""The preflight: what a run will do, told before its first step, and the checks that look at all of it.

    plan = make_plan(config, run, trainer, report, checks, known_rows=128256, precision=told)
    checks.enforce()
    run.record("plan.json", plan.as_json(checks))
    print("\\n".join(plan.lines(checks)))

The numbers are the run's own: its feed is asked for every step, and its scheduler for every learning rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from config.schema import RunConfig
from src.freezing import KINDS, kinds_of_weights
from src.packing import PackedRows
from src.plan_counts import StepCounts, count_steps
from src.plan_report import lines_of
from src.plan_sizes import Sizes
from src.rate_check import rate_findings
from src.run import Run
from src.served_checks import bos_findings, rows_of, stop_findings, untrained_findings
from src.start_checks import StartChecks
from src.start_loss import StartLoss, loss_findings, measure_start_loss
from src.steps import Batch
from src.trainer import SFTTrainer
from utils.checkpointing import step_of
from utils.distributed import shards_weights

SAMPLED_BATCHES = 16
"""First micro-batches of a process whose rows are looked at."""

CURVE_POINTS = 64
"""Learning rates that the record keeps, at steps that are spread evenly over the run."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. Counts are of all processes together, and of the whole run, also where it goes on."""

    steps: int
    first_step: int
    """Steps that were taken before; 0: it starts."""
    epochs: float | None
    """Passes over the rows; None: they are streamed."""
    processes: int
    device: str
    precision: str
    attention: str
    counts: StepCounts | None
    """None: the rows are streamed, or this is not the main process."""
    window: dict[str, float] | None
    """Of streamed rows, a step by the mean of the first ones: `tokens`, `supervised_tokens` and `padding_share`."""
    data: dict[str, Any]
    """Rows, packs and fill on each side, as data.json has them."""
    rates: np.ndarray
    """The learning rate of every step, float64, (steps,)."""
    weights: dict[str, tuple[int, int]]
    """By kind: numbers that train, and that do not."""
    sizes: Sizes | None
    """None: the weights are spread over processes."""
    start_loss: StartLoss | None
    files: tuple[str, ...]
    hub: str | None
    """Where the result is pushed to, and whether that may be."""

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers that train and in all."""
        trained, frozen = (sum(column) for column in zip(*self.weights.values(), strict=True))
        return {"trainable": trained, "total": trained + frozen}

    def lines(self, checks: StartChecks) -> list[str]:
        """What is printed of it."""
        return lines_of(self, checks)

    def as_json(self, checks: StartChecks, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """Plain JSON.

        Args:
            before: the record of an earlier start of this run, whose forced checks count on.
        """
        counts = self.counts
        points = np.unique(np.linspace(0, self.steps - 1, min(self.steps, CURVE_POINTS)).astype(int))
        forced = {*checks.overridden(), *((before or {}).get("forced", []))}
        return {
            "steps": self.steps,
            "first_step": self.first_step,
            "epochs": self.epochs,
            "processes": self.processes,
            "device": self.device,
            "precision": self.precision,
            "attention": self.attention,
            "tokens": None if counts is None else _spread(counts.tokens),
            "supervised_tokens": None if counts is None else _spread(counts.supervised),
            "rows": None if counts is None else int(counts.rows.sum()),
            "packs": None if counts is None else int(counts.packs.sum()),
            "padding_share": None if counts is None else counts.padding,
            "streamed_step": self.window,
            "learning_rate": {str(point + 1): float(self.rates[point]) for point in points},
            "weights": {kind: {"trained": t, "frozen": f} for kind, (t, f) in self.weights.items()},
            "bytes": None if self.sizes is None else vars(self.sizes),
            "start_loss": None if self.start_loss is None else vars(self.start_loss),
            "hub": self.hub,
            "findings": checks.as_json(),
            "forced": sorted(forced),
        }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "total": int(values.sum()),
        "least": int(values.min()),
        "mean": float(values.mean()),
        "most": int(values.max()),
    }


def make_plan(
    config: RunConfig,
    run: Run,
    trainer: SFTTrainer,
    report: dict[str, Any],
    checks: StartChecks,
    *,
    known_rows: int,
    precision: str,
) -> Plan:
    """Plan a run whose model and data are there, and make the checks that need them; every process calls this.

    The model's weights and the random numbers stay as they are.

    Args:
        report: what data.json will hold.
        checks: gets the findings, of all processes.
        known_rows: embeddings that the checkpoint came with.
        precision: number formats, in a line.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    feed = trainer.new_feed()
    sample = trainer.first_batches(SAMPLED_BATCHES)
    first_step = step_of(run.checkpoint) if run.checkpoint else 0
    weights = _weights(model)
    counts, streams = None, not isinstance(trainer.train_dataset, PackedRows)
    if trainer.args.should_save and not streams:  # every row is read for it, once on all machines
        collator = trainer.data_collator
        counts = count_steps(feed, pad_id=collator.pad_token_id, flat=collator.flat)
    whole = not shards_weights()
    start = measure_start_loss(trainer, sample[0]) if whole and first_step == 0 else None
    sizes = _sizes(config, run, trainer, steps=feed.steps, first_step=first_step) if whole else None
    total = sum(map(sum, weights.values()))
    _look(config, run, trainer, checks, sample, start, sizes, weights=total, known_rows=known_rows)
    return Plan(
        steps=feed.steps,
        first_step=first_step,
        epochs=None if streams else feed.epoch_at(feed.steps),
        processes=trainer.args.world_size,
        device=_device(trainer.args.device),
        precision=precision,
        attention=model.config._attn_implementation,
        counts=counts,
        window=_of_sample(trainer, sample) if streams else None,
        data=report,
        rates=trainer.learning_rates(feed.steps),
        weights=weights,
        sizes=sizes,
        start_loss=start,
        files=_files(config),
        hub=_hub(config, checks),
    )


def _look(
    config: RunConfig,
    run: Run,
    trainer: SFTTrainer,
    checks: StartChecks,
    sample: Sequence[Batch],
    start: StartLoss | None,
    sizes: Sizes | None,
    *,
    weights: int,
    known_rows: int,
) -> None:
    """Make the checks that need the model and its rows."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer, fresh = trainer.processing_class, config.model.path is None
    rows = rows_of(sample)
    generation = model.generation_config
    checks.add(stop_findings(rows, generation, tokenizer))
    checks.add(bos_findings(generation, tokenizer))
    if not shards_weights():
        checks.add(untrained_findings(rows, model, tokenizer, known_rows=known_rows))
        checks.add(loss_findings(start, model, starts_fresh=fresh))
    checks.add(rate_findings(config.optim, adapter=config.adapter.kind, weights=weights, starts_fresh=fresh))
    if sizes is not None and trainer.args.should_save:
        checks.add(sizes.findings(run.path))
    checks.agree()


def _sizes(config: RunConfig, run: Run, trainer: SFTTrainer, *, steps: int, first_step: int) -> Sizes:
    every = config.evaluation.every_steps or steps
    return Sizes.of(
        trainer,
        config.optim,
        config.training,
        steps=steps,
        first_step=first_step,
        evaluations=steps // every + 2 if trainer.eval_dataset else 0,
        run=run.path,
    )


def _weights(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers that train and that do not, by kind; all that trains beside frozen weights is the adapter's."""
    kinds, found = kinds_of_weights(model), dict.fromkeys((*KINDS, "adapter"), (0, 0))
    adapted = isinstance(model, PeftModel)
    for name, weight in model.named_parameters():
        number = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty weight in its place
        if type(weight).__name__ == "Params4bit":
            number *= 2 * weight.element_size()  # two 4-bit numbers a byte
        kind = "adapter" if adapted and (weight.requires_grad or "lora_" in name) else kinds[name]
        trained, frozen = found[kind]
        found[kind] = (trained + number, frozen) if weight.requires_grad else (trained, frozen + number)
    return {kind: numbers for kind, numbers in found.items() if any(numbers)}


def _device(device: torch.device) -> str:
    """The device that a process trains on, by its name where it has one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def _of_sample(trainer: SFTTrainer, sample: Sequence[Batch]) -> dict[str, float]:
    """What a step of a stream holds, by the mean of its first micro-batches."""
    pad_id = trainer.data_collator.pad_token_id
    tokens = sum(int((batch["input_ids"] != pad_id).sum()) for batch in sample)
    supervised = sum(len(batch["supervised_places"]) for batch in sample)
    steps = len(sample) / trainer.args.gradient_accumulation_steps / trainer.args.world_size
    return {
        "tokens": tokens / steps,
        "supervised_tokens": supervised / steps,
        "padding_share": 1 - tokens / sum(batch["input_ids"].numel() for batch in sample),
    }


def _files(config: RunConfig) -> tuple[str, ...]:
    """What the run's directory will hold."""
    samples = (
        ("samples.jsonl",) if config.evaluation.samples and (config.data.eval or config.data.eval_fraction) else ()
    )
    saved = ("checkpoint-N/",) if config.training.save_every_steps else ()
    records = ("config.json", "environment.json", "inputs.json", "data.json", "plan.json")
    return (*records, "metrics.jsonl", "result.json", "README.md", *samples, *saved, "model/")


def _hub(config: RunConfig, checks: StartChecks) -> str | None:
    if config.hub.repo_id is None:
        return None
    refused = any(finding.check == "hub_access" for finding in checks.findings)
    kind = "private" if config.hub.private else "public"
    return f"{config.hub.repo_id} ({kind}): {'may not be written, see below' if refused else 'may be written'}"
