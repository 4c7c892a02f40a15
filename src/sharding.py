"""What differs where each process holds a part of every weight: what cannot train so, and what a gathered model is.

check_sharding(config.model, config.adapter, config.optim)  # before anything loads
weights = gathered_weights(trainer)                         # whole, on the main process's host memory

Each entry was seen to fail, or to hold, in two processes under Accelerate's FSDP2 (tests/test_sharding.py).
"""

from dataclasses import replace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from config.schema import AdapterConfig, ModelConfig, OptimConfig
from utils.distributed import asks_for_fsdp
from utils.errors import UserError

PART_BY_PART = ("adamw_torch_fused", "adamw_torch", "sgd", "rmsprop")
"""Optimizers that update each number of a weight by itself and keep no state before the first step, so that a part of a
weight is updated as it is in the whole. Adafactor mixes whole rows with parts of them and ends in an error; Adagrad's
state is that of the whole weights; bitsandbytes has no operator for parts."""


def check_sharding(model: ModelConfig, adapter: AdapterConfig, optim: OptimConfig) -> None:
    """Refuse what does not train under FSDP, if that was asked for.

    Raises:
        UserError: the optimizer needs whole weights, or the base or the adapter's start does.
    """
    if not asks_for_fsdp():
        return
    if optim.name not in PART_BY_PART:
        raise UserError(
            f"optim.name={optim.name} does not work, or has not been seen to, on the parts of weights that FSDP gives "
            f"each process; use {', '.join(PART_BY_PART)}, or launch with config/accelerate/ddp.yaml"
        )
    if model.quantization == "int8":
        raise UserError(
            "model.quantization=int8 is held by bitsandbytes in a form that FSDP cannot part; use "
            "model.quantization=nf4, or launch with config/accelerate/ddp.yaml"
        )
    if adapter.init == "eva":
        raise UserError(
            "adapter.init=eva looks at the base's activations before FSDP has dealt out the weights, which only the "
            "first process has read by then; use adapter.init=default, or launch with config/accelerate/ddp.yaml"
        )


def refuse_under_fsdp(model: torch.nn.Module, what: str) -> None:
    """Refuse what PEFT wraps one side of a tied weight in: Accelerate ties the sides anew once it has dealt the weight
    out, and transformers then looks for it under names that PEFT has taken.

    Args:
        model: one with a head that is its embeddings.
    Raises:
        UserError: FSDP was asked for.
    """
    if asks_for_fsdp():
        raise UserError(
            f"{what} cannot train under FSDP in {type(model).__name__}, which uses one weight for its embeddings and "
            "its head; launch with config/accelerate/ddp.yaml, train all weights with adapter.kind=none, or use tokens "
            "that the model has"
        )


def sum_gradients_in_float32(trainer: Trainer) -> None:
    """Have FSDP2 add up the processes' gradients in float32, as DDP does for float32 weights; Accelerate would have it
    in the format of the products, in which a sum over many processes keeps 8 bits. To be called before training.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def gathered_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A sharded model's weights by name, each under one name; every process calls this, and the main one gets them.

    Tensors that were gathered one by one no longer show that two names mean one weight, and a file that has a tied head
    twice would load as a model whose head is its own.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    firsts = {name for name, _ in model.named_parameters()}
    seconds = {name for name, _ in model.named_parameters(remove_duplicate=False)} - firsts
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: tensor for name, tensor in weights.items() if name not in seconds}
