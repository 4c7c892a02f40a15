"""Next-token loss at supervised positions only; logits of other positions are never computed.

    nll_T, row_T = supervised_nll(model, batch)
    loss = nll_T.sum() / supervised_tokens_in_the_global_step

Shapes: B rows in a batch, L tokens in a row, T supervised tokens in the batch, V tokens in the vocabulary.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional
from transformers import modeling_utils

from src.attention import border_arguments
from src.packing import IGNORED

_KEEPS_BY_MASK = hasattr(modeling_utils, "slice_logits_to_keep")  # a (B, L) mask as `logits_to_keep`


def next_token_targets(labels_BL: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts: that of the token after it, and -100 at the last position. (B, L)."""
    return functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)


def supervised_nll(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, keep_by_mask: bool = _KEEPS_BY_MASK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every supervised token, with the row that it stands in.

    The model's head sees the hidden states before supervised tokens only, through `logits_to_keep`. A batch without a
    supervised token still passes through the model, so that a distributed backward finds its graph.

    Args:
        model: a causal language model, wrapped or not.
        batch: `input_ids`, `labels` (-100 where not supervised) and `position_ids`, each (B, L); with
            `longest_document` in it, attention is told that and `document_borders`.
        keep_by_mask: whether the model takes a (B, L) mask, which keeps exactly the supervised positions. Otherwise
            those that any row supervises are kept for all rows.
    Returns:
        `nll_T` in nats, float32 or the model's own wider type; `row_T`, int64, the row of each.
    """
    targets_BL = next_token_targets(batch["labels"])
    supervised_BL = targets_BL != IGNORED
    keep_BL = supervised_BL.clone()
    if not bool(keep_BL.any()):
        keep_BL[0, 0] = True
    if keep_by_mask:
        kept, targets_K, rows_K = keep_BL, targets_BL[keep_BL], keep_BL.nonzero()[:, 0]
    else:
        kept = keep_BL.any(dim=0).nonzero()[:, 0]
        targets_K = targets_BL[:, kept].flatten()
        rows_K = torch.arange(len(targets_BL), device=kept.device).repeat_interleave(len(kept))
    places = {"position_ids": batch["position_ids"]}
    if "longest_document" in batch:
        places |= border_arguments(batch["document_borders"], batch["longest_document"])
    logits = model(input_ids=batch["input_ids"], **places, use_cache=False, logits_to_keep=kept).logits
    logits_KV = logits.flatten(end_dim=-2)
    if logits_KV.dtype in (torch.float16, torch.bfloat16):
        logits_KV = logits_KV.float()
    nll_K = functional.cross_entropy(logits_KV, targets_K, ignore_index=IGNORED, reduction="none")
    if not bool(supervised_BL.any()):
        return nll_K, rows_K  # one zero, with a graph behind it
    counted_K = targets_K != IGNORED
    return nll_K[counted_K], rows_K[counted_K]
