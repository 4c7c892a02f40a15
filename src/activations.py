"""What of the forward pass waits for the backward pass: all of it, a part, or a copy in host memory.

    recompute_activations(model, "full")
    waiting = offload_activations(model)
    with waiting:
        model(**batch).loss.backward()

`full` keeps what enters each decoder layer and computes the layer again (arXiv:1604.06174). `selective` keeps the
results of matrix products and attention too, which are nearly all of a layer's time, and computes again what is
cheap and large: norms, activations, rotary embeddings, residual sums, casts (arXiv:2205.05198).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from utils.distributed import accelerator_name
from utils.errors import UserError

_PRODUCTS = ("mm", "addmm", "linear", "_grouped_mm")
"""Products with weights. Not `bmm`: attention that is written out makes its scores with it, which grow with the square
of a document's length."""

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
)
"""torch's fused attention kernels, as scaled_dot_product_attention calls them."""

_REGISTERED_LATER = ("varlen_attn", "flash_attn")
"""Parts of the names of operators that exist once their module is imported: torch's attention in documents, and the
packages of flash-attention, whose namespaces are such as flash_attn_3."""


def recompute_activations(model: PreTrainedModel, kind: Literal["full", "selective"] = "full") -> None:
    """Keep only a part of each decoder layer's activations, and compute the rest again in the backward pass.

    Args:
        kind: `full` keeps what enters a layer; `selective` the results of its matrix products and attention too.
    Source: transformers renamed the switch from gradient to activation checkpointing.
    """
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = _selective_contexts
    switch(**{f"{switch.__name__.removesuffix('_enable')}_kwargs": options})


def check_offload() -> None:
    """
    Raises:
        UserError: this machine has no GPU whose memory could be spared.
    """
    if accelerator_name() != "cuda":
        raise UserError(
            "training.activation_offload=true moves activations from a CUDA GPU to host memory, and this machine has "
            "no such GPU; leave it out"
        )


def offload_activations(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """What holds activations in pinned host memory during the forward and backward passes within it, again and again.

    Copies run on a stream of their own, beside the computation. Parameters, tensors below 1 KiB and what the head
    saves stay where they are.

    Args:
        model: on its GPU; its head gets hooks, so that this is to be called once.
    """
    from trl.models import get_act_offloading_ctx_manager

    return get_act_offloading_ctx_manager(model, warn_if_no_head=False)


@functools.cache
def _kept_ops() -> frozenset[Any]:
    """Products and fused attention kernels that this torch has."""
    packets = [getattr(torch.ops.aten, name, None) for name in (*_PRODUCTS, *_ATTENTION)]
    return frozenset(packet.default for packet in packets if packet is not None)


def _keeps(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept: that of products, and of attention that draws no random numbers.

    Dropout within a kernel advances the generator. Were it left out of the second computation, every dropout after it
    in the layer would draw other numbers than the first time, and gradients would be wrong without a word.
    """
    kept = op in _kept_ops() or any(part in str(op) for part in _REGISTERED_LATER)
    if kept and not _draws(op, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a kernel is called with a dropout above 0."""
    place = _dropout_place(op)
    if place is None:
        return False
    index, name = place
    return bool(args[index] if index < len(args) else kwargs.get(name))


@functools.cache
def _dropout_place(op: Any) -> tuple[int, str] | None:
    """Index and name of the argument that is a probability of dropout; None where there is none."""
    signatures = get_signature_for_torch_op(op) or []
    names = [name for signature in signatures for name in signature.parameters]
    return next(((index, name) for index, name in enumerate(names) if "dropout" in name), None)


def _selective_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts of a layer's first and second computation."""
    first, second = create_selective_checkpoint_contexts(_keeps)
    return _casting_anew(first), _casting_anew(second)


@contextlib.contextmanager
def _casting_anew(mode: contextlib.AbstractContextManager) -> Iterator[None]:
    """Enter a context without autocast's memory of cast weights, which the second computation does not find: it would
    cast where the first did not, and the operations of the two would no longer be the same."""
    remembers = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with mode:
            yield
    finally:
        torch.set_autocast_cache_enabled(remembers)
