"""The settings of a run as transformers' Trainer takes them.

args = training_arguments(run.path, config.optim, config.training, config.evaluation, config.tracking)
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers.training_args import TrainingArguments

from config.schema import EvaluationConfig, OptimConfig, TrackingConfig, TrainingConfig
from src.activations import check_offload
from src.optim import check_installed, optimizer_arguments
from utils.distributed import accelerator_name
from utils.errors import UserError
from utils.logging import get_logger
from utils.peers import STEP_TIMEOUT_S

log = get_logger(__name__)


class RunArguments(TrainingArguments):
    """Trainer's arguments, whose CPU has no number.

    Where several processes train on a CPU, Accelerate calls it `cpu:0`, `cpu:1` ..., names to which torch loads no
    tensor. transformers 5.17 has it load the optimizer of a checkpoint to what stands here.
    """

    @property
    def device(self) -> torch.device:
        """Of this process's weights and batches."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def uses_autocast(precision: str) -> tuple[bool, bool]:
    """Whether `training.precision` means bf16 autocast, and whether fp16, on this machine.

    Raises:
        UserError: the machine has no such arithmetic.
    """
    on_gpu = accelerator_name() == "cuda"
    if precision == "fp16" and not on_gpu:
        raise UserError("training.precision=fp16 needs a CUDA GPU; use float32 or bf16")
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise UserError("training.precision=bf16 is not supported by this GPU; use fp16 or float32")
    bf16 = precision == "bf16" or (precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    return bf16, precision == "fp16"


def training_arguments(
    folder: Path,
    optim: OptimConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    tracking: TrackingConfig,
    *,
    run_name: str = "run",
    evaluates: bool = False,
    autocasts: bool = True,
    resumes: bool = False,
) -> TrainingArguments:
    """Trainer's arguments for a run; making them joins the process group of a distributed launch.

    Args:
        folder: run directory; checkpoints are written below it.
        run_name: what trackers call the run.
        evaluates: whether there are evaluation rows.
        autocasts: whether `training.precision` applies; false for weights that are held in float64 or float16.
        resumes: whether the run goes on from a checkpoint, and so is not evaluated before its first step.
    Raises:
        UserError: the precision, offload or optimizer is not to be had on this machine, or a tracker not installed.
    """
    _check_trackers(tracking)
    if training.activation_offload:
        check_offload()
    bf16, fp16 = uses_autocast(training.precision) if autocasts else (False, False)
    args = RunArguments(
        output_dir=str(folder),
        run_name=run_name,
        project=tracking.project,
        report_to=list(tracking.report_to) or "none",
        use_cpu=accelerator_name() == "cpu",
        **optimizer_arguments(optim),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_rows,
        gradient_accumulation_steps=training.accumulation_steps,
        bf16=bf16,
        fp16=fp16,
        seed=training.seed,
        data_seed=training.seed,
        logging_strategy="steps",
        logging_steps=training.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if training.save_every_steps else "no",
        save_steps=training.save_every_steps or 500,
        **_evaluation_arguments(evaluation, evaluates=evaluates, resumes=resumes),
        label_names=["labels"],
        remove_unused_columns=False,
        ignore_data_skip=True,  # the feed itself goes to the step that a resumed run is at
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_timeout=STEP_TIMEOUT_S,
        dataloader_pin_memory=accelerator_name() == "cuda",
        average_tokens_across_devices=False,  # the global step's tokens are counted here, not by Trainer
    )
    check_installed(args)
    return _with_own_precision(args)


def _check_trackers(tracking: TrackingConfig) -> None:
    """
    Raises:
        UserError: a tracker is not installed.
    """
    for tracker in tracking.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"tracking.report_to names {tracker}, which is not installed; run `pip install {tracker}` (see "
                "requirements/tracking.txt), or leave it out"
            )


def _evaluation_arguments(evaluation: EvaluationConfig, *, evaluates: bool, resumes: bool) -> dict[str, Any]:
    return {
        "eval_strategy": "steps" if evaluates and evaluation.every_steps else "no",
        "eval_steps": evaluation.every_steps,
        "eval_on_start": evaluates and not resumes,
        "per_device_eval_batch_size": evaluation.micro_batch_rows,
    }


def _with_own_precision(args: TrainingArguments) -> TrainingArguments:
    """Let the recipe alone decide the format of matrix products: transformers takes the launcher's where the recipe
    asks for none, and a run in float32 would be one in bfloat16 under another name."""
    decided = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if args.mixed_precision != decided:
        log.warning(
            "the launcher's mixed_precision: %s is passed over, as training.precision and model.dtype decide it here",
            args.mixed_precision,
        )
        args.mixed_precision = decided
    return args
