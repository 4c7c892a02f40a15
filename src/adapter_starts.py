"""What LoRA matrices start from, where PEFT needs more for it than the model: the base's full weights, or data.

start_from_rounding_errors(model, revision)     # LoftQ
start_from_batches(model, batches)              # EVA
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, initialize_lora_eva_weights, replace_lora_weights_loftq

from src.loss import model_arguments
from utils.errors import UserError

FIRST_BATCHES = 32
"""Micro-batches that EVA looks at, at most; it stops once its directions no longer change."""

EVA_ROUNDS = 16
"""Times that it looks at each of them, at most."""


def start_from_rounding_errors(model: PeftModel, revision: str | None) -> None:
    """LoftQ's start: what 4-bit weights have lost, as far as the rank holds it (arXiv:2310.08659).

    Raises:
        UserError: PEFT cannot, as without a GPU, or where the base has no safetensors.
    """
    base = model.get_base_model().name_or_path
    try:
        folder = base if Path(base).is_dir() else snapshot_download(base, revision=revision, local_files_only=True)
        replace_lora_weights_loftq(model, model_path=str(folder))
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"adapter.init=loftq cannot start beside {base} here: {' '.join(str(error).split())[:200]}; it needs a "
            "GPU and safetensors; use adapter.init=default"
        ) from error


def start_from_batches(model: PeftModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """EVA's start: the main directions of each layer's inputs in some batches (arXiv:2410.07170).

    Ranks are dealt out anew between layers, so parameters change, and an optimizer must be made afterwards.

    Args:
        batches: as the model trains on them, on its device, with `labels`.
    Raises:
        UserError: the batches hold too few tokens for the rank, or too few of them differ.
    """

    passes = 0

    def run(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        nonlocal passes
        passes += 1
        if passes > EVA_ROUNDS * len(batches):  # PEFT goes round for ever
            raise ValueError(
                f"directions have not settled in {EVA_ROUNDS} rounds of {len(batches)} micro-batch(es), of which those "
                "with fewer supervised tokens than twice adapter.rank count for none"
            )
        model(**model_arguments(batch))

    try:
        initialize_lora_eva_weights(model, batches, forward_fn=run, show_progress_bar=False)
    except ValueError as error:
        raise UserError(
            f"adapter.init=eva could not start from the first batches: {' '.join(str(error).split())[:200]}; give "
            "larger ones, or a lower adapter.rank"
        ) from error
