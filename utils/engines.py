"""Whether weights that should be sharded over processes are, and nothing else is.

Accelerate shards over accelerators only: on a CPU it gives every process the whole model, and says nothing.

    check_engine(accelerator_name())                 # at the start
    check_parallelism(packing=config.data.packing)
    trainer.add_callback(Sharded())                  # once Accelerate has done what it was asked for
"""

import os
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, str_to_bool
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from utils.errors import UserError
from utils.launch_command import ENGINES, asked_of_launcher, engine_told


def check_engine(device: str) -> None:
    """Make sure that Accelerate can do here what it was asked for.

    Args:
        device: the type of the device that trains, such as `cuda`.
    Raises:
        UserError: FSDP or DeepSpeed is asked for, and would be left out without a word.
    """
    told, asked = engine_told(), asked_of_launcher()
    engine = told or (asked.engine if asked else None)
    if engine is None:
        return
    if device == "cpu":
        raise UserError(
            f"{engine} is asked for and there is no accelerator: on a CPU, Accelerate leaves it out, so that every "
            "process holds the whole model. Launch where there are GPUs, or without it: `accelerate launch "
            "--config_file config/accelerate/ddp_cpu.yaml train.py ...`"
        )
    if told is None:
        raise UserError(
            f"`accelerate launch` was asked for {engine}, and has not told this process so ({ENGINES[engine]} is not "
            "set), as it does with --cpu; leave out --cpu"
        )


def check_parallelism(*, packing: bool) -> None:
    """Make sure that no processes are to share rows, which each process here has of its own.

    Accelerate's context parallel splits rows between processes, and takes from attention every mask but the causal one.
    The rows of a batch would be parts of different ones, and labels would be shifted within the parts.

    Args:
        packing: whether documents share rows.
    Raises:
        UserError: a parallelism other than that of data is asked for.
    """
    if not str_to_bool(os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false")):
        return
    sizes = ParallelismConfig()
    for name, what in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        size = getattr(sizes, f"{name}_size", 1)
        if size == 1:
            continue
        leak = " With data.packing=true the documents of a pack would see each other, too." if packing else ""
        raise UserError(
            f"parallelism_config_{name}_size={size} asks for {what} parallel, in which {size} processes compute on the "
            f"same rows; here each process has rows of its own, so the loss would be wrong.{leak} Launch with "
            "config/accelerate/fsdp2.yaml; rows that are too long for a GPU take less memory with "
            "training.gradient_checkpointing=full and training.activation_offload=true"
        )


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a part of a model's weights is with other processes, by either version of FSDP."""
    return any(isinstance(weight, DTensor) for weight in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )


class Sharded(TrainerCallback):
    """Stops a run that asked for FSDP or DeepSpeed and, as its training begins, has neither."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Raises:
            UserError: nothing is sharded.
        """
        engine = engine_told()
        if engine is None:
            return
        kind = AcceleratorState().distributed_type
        done = is_sharded(model) if engine == "FSDP" else kind == DistributedType.DEEPSPEED
        if not done:
            raise UserError(
                f"{engine} is asked for ({ENGINES[engine]}=true), and no weight is sharded: Accelerate runs as "
                f"{kind.value} on {args.device.type}. Start the processes with `accelerate launch --config_file "
                f"config/accelerate/...`, or unset {ENGINES[engine]}"
            )
