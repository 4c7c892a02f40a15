"""Training as a plain loop does it, with nothing that a run needs beside: the floor under every contender's time.

Attention is computed in each document alone, logits at supervised positions only, and the weights are stepped by a
fused AdamW; nothing is checked, logged or saved.

train_floor(model, layout, args, clock)

Shapes: L tokens in a micro-batch, T of them before supervised ones, V tokens in the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.training_args import TrainingArguments

from scripts.benchmarking.clock import BatchCounts, Clock
from scripts.benchmarking.layout import Layout
from src.kernels import attend_varlen, varlen_serves
from src.packing import IGNORED

FLOOR = "floor"
"""The name of the floor's attention in transformers."""


def attend_floor(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: list[int],
    borders: torch.Tensor,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in each document alone, by the calling convention of transformers.

    Args:
        query, key, value: (1, heads, L, head size).
        documents: tokens of each document.
        borders: int32, (documents + 1,), on the device: where each starts, and the end.
    Returns:
        (1, L, heads, head size), and None in the place of weights.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in (query, key, value))
    options = {"causal": True, "window": None, "dropout": 0.0, "scale": scaling}
    if varlen_serves(query, key, value, **options):
        return attend_varlen(query, key, value, borders=borders, longest=max(documents), **options), None
    parts = zip(*(tensor.split(documents, dim=2) for tensor in (query, key, value)), strict=True)
    outs = [
        functional.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def register_floor() -> None:
    """Make the floor's attention known to transformers, without a mask."""
    AttentionInterface.register(FLOOR, attend_floor)
    AttentionMaskInterface.register(FLOOR, lambda *args, **kwargs: None)


@dataclass
class FloorRun:
    """What the loop saw, in order."""

    losses: list[torch.Tensor] = field(default_factory=list)
    """Loss a supervised token, one a step, on the device."""
    grad_norms: list[torch.Tensor] = field(default_factory=list)
    counts: list[BatchCounts] = field(default_factory=list)
    """One a micro-batch."""


def _micro_batches(layout: Layout) -> Iterator[dict[str, np.ndarray]]:
    """Each micro-batch as one row: ids, the label of the token after each, places, and tokens of each document."""
    rows = layout.case.micro_batch_rows
    for first in range(0, len(layout.order), rows):
        packs = [layout.packs[index] for index in layout.order[first : first + rows]]
        labels = np.concatenate([pack["labels"] for pack in packs])
        lengths = np.concatenate([pack["lengths"] for pack in packs])
        yield {
            "input_ids": np.concatenate([pack["input_ids"] for pack in packs]).astype(np.int64),
            "targets": np.append(labels[1:], IGNORED).astype(np.int64),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "lengths": lengths,
        }


def train_floor(model: PreTrainedModel | PeftModel, layout: Layout, args: TrainingArguments, clock: Clock) -> FloorRun:
    """Train for all steps of a case, by the optimizer settings of `args`."""
    device, run = args.device, FloorRun()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_attn_implementation(FLOOR)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(
        weights, args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
    )
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16)
    batches = _micro_batches(layout)
    model.train()
    clock.start()
    for _ in range(layout.case.all_steps):
        step = [next(batches) for _ in range(layout.case.accumulation_steps)]
        supervised = sum(int((batch["targets"] != IGNORED).sum()) for batch in step)
        loss = torch.zeros((), device=device)
        for batch in step:
            run.counts.append(_counts(batch))
            with autocast:
                part = _summed_loss(base, batch, device) / supervised
            part.backward()
            loss += part.detach()
        run.losses.append(loss)
        run.grad_norms.append(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()
    return run


def _summed_loss(base: PreTrainedModel, batch: dict[str, np.ndarray], device: torch.device) -> torch.Tensor:
    """Negative log-likelihood of all supervised tokens of a micro-batch, in nats."""
    ids, targets, places = (
        torch.from_numpy(batch[name]).to(device, non_blocking=True) for name in ("input_ids", "targets", "position_ids")
    )
    documents = batch["lengths"].tolist()
    borders = torch.tensor([0, *accumulate(documents)], dtype=torch.int32).to(device, non_blocking=True)
    hidden = base.model(
        input_ids=ids[None], position_ids=places[None], use_cache=False, documents=documents, borders=borders
    ).last_hidden_state[0]
    kept = torch.from_numpy(np.flatnonzero(batch["targets"] != IGNORED)).to(device, non_blocking=True)
    logits_TV = base.lm_head(hidden[kept])
    return functional.cross_entropy(logits_TV.float(), targets[kept], reduction="sum")


def _counts(batch: dict[str, np.ndarray]) -> BatchCounts:
    tokens, lengths = len(batch["input_ids"]), batch["lengths"].astype(np.int64)
    supervised = int((batch["targets"] != IGNORED).sum())
    return BatchCounts(tokens, supervised, positions=tokens, pairs=int((lengths * (lengths + 1) // 2).sum()))
