"""Noise on the embeddings of training rows (NEFTune), which keeps a model from learning its rows by heart.

    with noisy_embeddings(model, batch, alpha=5.0):
        loss = score(model, batch).total

Source: arXiv:2310.05914. A document of n tokens gets noise of the size that it would get alone, whatever it is packed
with.

Shapes: B rows in a batch, L tokens in a row, H the model's width.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


@contextlib.contextmanager
def noisy_embeddings(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], alpha: float | None) -> Iterator[None]:
    """Have the model's input embeddings add noise while the context lasts, if they are in training mode.

    The noise is uniform between ±alpha / sqrt(n H), n the tokens of the document, with any padding after it.

    Args:
        model: a causal language model, not wrapped by DDP or its like.
        batch: `input_ids` (B, L) and `document_borders` (documents + 1,).
        alpha: None: no noise.
    """
    if alpha is None:
        yield
        return
    lengths = batch["document_borders"].diff()
    shape = batch["input_ids"].shape
    tokens_BL = lengths.repeat_interleave(lengths, output_size=shape.numel()).view(shape)

    def add(module: torch.nn.Module, args: tuple[Any, ...], output_BLH: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output_BLH
        most_BL1 = alpha / (tokens_BL * output_BLH.shape[-1]).sqrt()[..., None]
        return output_BLH + torch.empty_like(output_BLH).uniform_(-1, 1) * most_BL1.to(output_BLH.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
