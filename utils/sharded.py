"""Whether weights that should be sharded over processes are.

Accelerate shards over accelerators only: on a CPU it gives every process the whole model, and says nothing.

    check_engine(accelerator_name())     # at the start
    trainer.add_callback(Sharded())      # once Accelerate has done what it was asked for
"""

from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
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
