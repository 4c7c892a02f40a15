"""Attention in documents: torch's kernels, and a plain computation for what they cannot do.

    out = attend_fused(query, key, value, causal=True, window=None, dropout=0.0, scale=0.125)

Shapes: B rows, L tokens in a row, H heads of queries, K heads of keys and values, D numbers in a head. Every K-th part
of the heads of queries shares a head of keys and values, which is never copied.
"""

import functools
import inspect
from collections.abc import Iterator

import torch
from torch.nn import functional

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch before this kernel
    varlen_attn = None

VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
"""What torch's variable-length kernel can be told; empty where there is none."""

QUERIES_AT_ONCE = 512
"""Queries of a long document that are taken together, so that keys after them or before their window are left out."""


def varlen_serves(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    dropout: float,
    scale: float,
) -> bool:
    """Whether torch's variable-length kernel takes this attention: half precision on a GPU of Ampere's kind or later,
    heads of at most 256 numbers, no dropout, and as much of the rest as this torch knows."""
    if not query.is_cuda or varlen_attn is None or dropout or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    needs = {"enable_gqa"} if query.shape[1] != key.shape[1] else set()
    needs |= {"window_size"} if window is not None else set()
    fits = query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return fits and needs <= VARLEN_OPTIONS and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    borders: torch.Tensor,
    longest: int,
    causal: bool,
    window: int | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """All documents of all rows in one kernel, which `varlen_serves` has said that it can.

    Args:
        borders: int32, (documents + 1,), on the device: starts in the rows, one after the other, and their end.
        longest: tokens in the longest document.
    Returns:
        (B, L, H, D).
    """
    rows, heads, tokens, size = query.shape
    flat = [tensor.transpose(1, 2).reshape(rows * tokens, -1, size) for tensor in (query, key, value)]
    options = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    if "window_size" in VARLEN_OPTIONS:  # tokens before a query and after it; -1: all
        options["window_size"] = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "scale" in VARLEN_OPTIONS:
        options["scale"] = scale
    else:
        flat[0] = flat[0] * (scale * size**0.5)  # the kernel's own is the root of the size
    return varlen_attn(*flat, borders, borders, longest, longest, **options).view(rows, tokens, heads, size)


def attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """torch's scaled-dot-product attention, every row one document.

    Args:
        query, key, value: (B, H, L, D), (B, K, L, D), (B, K, L, D).
        window: tokens that a query sees at most, its own among them. None: all before it.
    Returns:
        (B, H, L, D).
    """
    attend = functools.partial(
        functional.scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    length = query.shape[2]
    if not causal or window is None or window >= length:
        return attend(query, key, value, is_causal=causal)
    outs = []
    for queries, first, end in _blocks(query, window):
        hidden = _band(queries.shape[2], end - first, window, query.device)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
        outs.append(attend(queries, key[:, :, first:end], value[:, :, first:end], attn_mask=mask))
    return torch.cat(outs, dim=2)


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    dropout: float,
    scale: float,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention written out, with what no kernel of torch's has; every row one document, or as `mask` says.

    Args:
        query: (B, H, L, D).
        key, value: (B, K, keys, D).
        window: tokens that a query sees at most, its own among them. None: all before it.
        mask: bool, true where a query sees a key, or added to the scores; broadcasts to (B, H, L, keys). With it,
            `causal` is false.
        softcap: scores are bent into -softcap..softcap by tanh. None: they are not.
        sinks: (H,), a logit of each head that takes probability and gives no value. None: there is none.
    Returns:
        (B, H, L, D).
    """
    options = {"dropout": dropout, "scale": scale, "softcap": softcap, "sinks": sinks}
    if not causal:
        return _weigh(query, key, value, mask=mask, **options)
    outs = []
    for queries, first, end in _blocks(query, window):
        seen = ~_band(queries.shape[2], end - first, window, query.device)
        outs.append(_weigh(queries, key[:, :, first:end], value[:, :, first:end], mask=seen, **options))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _weigh(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Values weighed by the softmax, in float32 or wider, of the scores. Queries of a group stand end to end, so that
    one product with their common keys serves them all."""
    rows, heads, length, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size)
    scores = (grouped @ key.transpose(2, 3) * scale).view(rows, heads, length, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if scores.dtype != torch.float64:
        scores = scores.float()
    if mask is not None:
        hides = mask.dtype == torch.bool
        # Not minus infinity: a padding token that sees nothing would get weights that are no numbers.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if hides else scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(rows, heads, length, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    weights = functional.dropout(weights, p=dropout) if dropout else weights
    weighed = weights.reshape(rows, key.shape[1], -1, key.shape[2]) @ value
    return weighed.view(rows, heads, length, -1)


def _blocks(query: torch.Tensor, window: int | None) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Queries in blocks, with the first key that any of a block sees, and the end of those that they see."""
    end = 0
    for queries in query.split(QUERIES_AT_ONCE, dim=2):
        first = 0 if window is None else max(0, end - window + 1)
        end += queries.shape[2]
        yield queries, first, end


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool, (queries, keys): true where a key is after its query or before its window. The last are the same token."""
    ages = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return ages < 0 if window is None else (ages < 0) | (ages >= window)
