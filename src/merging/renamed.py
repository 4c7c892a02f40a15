"""Checkpoints that store tensors under other names, or in other pieces, than transformers' modules have.

Such are those of mixtures of experts, which store each expert by itself. transformers alone knows the way from the one
to the other and back, for a whole model in memory.

    tensors = module_tensors(Path("mixtral"))
    write_stored(tensors, settings, Path("aside"))
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig

from src.checkpoints.checkpoint import LazyTensor


def module_tensors(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by the names that they have in the model, all held in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in model.state_dict().items()
    }


def write_stored(
    tensors: Mapping[str, LazyTensor], settings: PreTrainedConfig, folder: Path, dtype: torch.dtype
) -> None:
    """Write tensors that have the model's names under those that its family's checkpoints store.

    Args:
        settings: of the model.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings)
    loaded = {
        name: tensor.load().to(dtype if tensor.dtype.is_floating_point else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    model.save_pretrained(folder, state_dict=loaded)
