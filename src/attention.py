"""Attention that never crosses documents, on every device, without an extra package.

transformers gets it as the attention implementation `documents`. Borders of documents reach it under the names that
transformers has for variable-length attention, and no mask is made for them. It takes torch's variable-length kernel on
a GPU that has one, and elsewhere attends in each document alone, which computes nothing that a mask would throw away.

    register_documents()
    model.set_attn_implementation(DOCUMENTS)
    model(input_ids=ids, position_ids=positions, **border_arguments(borders, longest))

Shapes: B rows, L tokens in a row, H heads of queries, K heads of keys and values, D numbers in a head.
"""

import functools
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from src.kernels import attend_fused, attend_plainly, attend_varlen, varlen_serves
from utils.errors import UserError

DOCUMENTS = "documents"
"""The name of this implementation, in transformers and in `model.attention`."""

_WITHOUT_EFFECT = frozenset(
    {"cache_position", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits"}
    | {"past_key_values", "position_embeddings", "return_dict", "seq_idx", "use_cache"}
)
"""Arguments of models that reach attention and say nothing about its result."""

_BENDS = frozenset({"softcap", "sinks"})
"""Options that only the plain computation has."""

_numbers = WeakTensorKeyDictionary()
"""Borders as numbers of the host, by their tensor on a device: told, or else read once for all layers, as reading waits
for the device."""


class UnknownArgumentError(UserError):
    """A model gives its attention something that would change the result and that no kernel here knows."""


def register_documents() -> None:
    """Make the implementation known to transformers, with the mask that padded batches and generation need."""
    AttentionInterface.register(DOCUMENTS, attend_documents)
    AttentionMaskInterface.register(DOCUMENTS, documents_mask)


def border_arguments(borders: torch.Tensor, longest: int) -> dict[str, torch.Tensor | int]:
    """The borders of documents under the names that transformers passes on to attention.

    Args:
        borders: int32, (documents + 1,), as `PackCollator` makes them.
        longest: tokens in the longest document. A number of the host, so that no kernel waits for the device.
    """
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def tell_borders(borders: torch.Tensor, numbers: list[int]) -> None:
    """Spare an attention without the variable-length kernel the wait for borders that the host knows.

    Args:
        borders: on a device, as `border_arguments` is then given them.
    """
    _numbers[borders] = numbers


def documents_mask(*, q_length: int, kv_length: int, **arguments: Any) -> torch.Tensor | None:
    """The mask of an attention in which every token sees the tokens of its own document up to itself.

    Args:
        arguments: those of transformers' mask functions.
    Returns:
        None where borders and the layer's window say all, as in training. Else a bool mask that broadcasts to
        (B, 1, queries, keys): for padded rows, for queries after a cache, and for patterns that are not causal or go by
        chunks.
    """
    function = arguments.get("mask_function", causal_mask_function)
    # transformers lays windows and the borders that positions give over the causal pattern by intersection; a union
    # lets tokens see later ones.
    causal = function is causal_mask_function or function.__name__ == "and_mask"
    causal = causal and "allow_is_bidirectional_skip" not in arguments and not arguments.get("use_vmap", False)
    window = getattr(arguments.get("config"), "sliding_window", None)
    offsets = [arguments.get(name, 0) for name in ("q_offset", "kv_offset")]
    whole = q_length == kv_length > 1 and all(isinstance(offset, int) and offset == 0 for offset in offsets)
    if causal and whole and arguments.get("attention_mask") is None and arguments.get("local_size") in (None, window):
        return None
    # Without a mask, queries stand for all keys, or are the newest of them.
    skips = arguments.get("allow_is_causal_skip", True) and q_length in (1, kv_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **(arguments | {"allow_is_causal_skip": skips}))


def attend_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by the calling convention of transformers.

    Args:
        query, key, value: (B, H, L, D), (B, K, L, D) and (B, K, L, D); with a cache, keys and values are longer.
        attention_mask: bool or additive, (B, 1 or H, queries, keys). It says all: window and borders are in it.
        sliding_window: tokens that a query sees at most, its own among them. None: all.
        softcap: scores are bent into -softcap..softcap by tanh. None: they are not.
        s_aux: (H,), a logit of each head that takes probability and gives no value. None: there is none.
        cu_seq_lens_q, max_length_q: where each document starts in all rows, one after the other, and their end; and the
            tokens of the longest. None: `position_ids` that do not go up by 1 start a document, or where these are
            missing too, each row is one.
        cu_seq_lens_k, max_length_k: the same for keys.
    Returns:
        (B, L, H, D), and None in the place of weights.
    Raises:
        UnknownArgumentError: an argument is given that no kernel here knows.
        ValueError: the borders are not those of these rows.
    """
    _refuse_unknown(others)
    query, key, value = _in_one_dtype(query, key, value)
    tokens, size = query.shape[2:]
    options = {"dropout": dropout, "scale": scaling if scaling is not None else size**-0.5}
    bent = {"softcap": softcap, "sinks": s_aux} if softcap is not None or s_aux is not None else {}
    if attention_mask is not None or key.shape[2] != tokens:
        return _attend_masked(module, query, key, value, attention_mask, is_causal=is_causal, **options, **bent), None
    options["causal"] = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options["window"] = sliding_window
    varlen = not bent and varlen_serves(query, key, value, **options)
    if varlen and cu_seq_lens_q is not None and max_length_q is not None:
        return attend_varlen(query, key, value, borders=cu_seq_lens_q, longest=max_length_q, **options), None
    return _attend_read(query, key, value, cu_seq_lens_q, position_ids, varlen=varlen, **options, **bent), None


@torch.compiler.disable(reason="what is compiled would serve packs of as many documents only")
def _attend_read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    given: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    varlen: bool,
    **options: Any,
) -> torch.Tensor:
    """Attention in documents whose borders are read from tensors. (B, L, H, D).

    Args:
        given, positions: `cu_seq_lens_q` and `position_ids` of `attend_documents`.
        varlen: whether the variable-length kernel serves.
    """
    rows, tokens = query.shape[0], query.shape[2]
    borders = _borders(given, positions, rows, tokens)
    if varlen:
        starts = torch.tensor(borders, dtype=torch.int32, device=query.device)
        longest = max(end - start for start, end in pairwise(borders))
        return attend_varlen(query, key, value, borders=starts, longest=longest, **options)
    attend = functools.partial(attend_plainly if options.keys() & _BENDS else attend_fused, **options)
    if borders == list(range(0, rows * tokens + 1, tokens)):
        return attend(query, key, value).transpose(1, 2)
    parts = zip(*(_apart(tensor, borders) for tensor in (query, key, value)), strict=True)
    out = torch.cat([attend(*part).transpose(1, 2) for part in parts], dim=1)
    return out.view(rows, tokens, *out.shape[2:])


def _attend_masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool | None,
    dropout: float,
    scale: float,
    **bent: Any,
) -> torch.Tensor:
    """Attention as a mask says, or of the newest tokens to all in a cache. (B, L, H, D)."""
    if not bent:
        options = {"dropout": dropout, "scaling": scale, "is_causal": is_causal}
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)[0]
    if mask is None and query.shape[2] > 1:
        raise ValueError(
            f"{query.shape[2]} queries and {key.shape[2]} keys came without a mask that says who sees whom"
        )
    out = attend_plainly(query, key, value, causal=False, mask=mask, dropout=dropout, scale=scale, **bent)
    return out.transpose(1, 2)


def _refuse_unknown(others: Mapping[str, Any]) -> None:
    given = [name for name, value in others.items() if value is not None and value is not False]
    unknown = sorted(name for name in given if name not in _WITHOUT_EFFECT)
    if unknown:
        raise UnknownArgumentError(
            f"this model gives its attention {', '.join(unknown)}, which model.attention={DOCUMENTS} does not know and "
            "will not leave out; set model.attention to sdpa or eager"
        )


def _in_one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values in the number format of matrix products: norms may leave some of them in float32."""
    device, dtype = tensors[-1].device.type, tensors[-1].dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]


def _borders(given: torch.Tensor | None, positions: torch.Tensor | None, rows: int, tokens: int) -> list[int]:
    """Where each document starts in all rows, one after the other, and their end."""
    if given is not None:
        borders = given.tolist() if given.device.type == "cpu" else _read_once(given)
    elif positions is not None and positions.dim() == 2 and positions.shape[1] == tokens:
        starts = torch.diff(positions, prepend=positions[:, :1] - 2) != 1
        borders = [*starts.expand(rows, tokens).flatten().nonzero()[:, 0].tolist(), rows * tokens]
    else:
        borders = list(range(0, rows * tokens + 1, tokens))
    if borders[-1] != rows * tokens or not set(range(0, borders[-1], tokens)) <= set(borders):
        raise ValueError(
            f"borders {borders} do not part {rows} rows of {tokens} tokens, each of which starts a document"
        )
    return borders


def _read_once(borders: torch.Tensor) -> list[int]:
    if borders not in _numbers:
        _numbers[borders] = borders.tolist()
    return _numbers[borders]


def _apart(tensor: torch.Tensor, borders: list[int]) -> list[torch.Tensor]:
    """The documents of (B, heads, L, D), each (1, heads, tokens, D). Splitting adds up gradients in one pass."""
    rows, tokens = tensor.shape[0], tensor.shape[2]
    lengths = [[] for _ in range(rows)]
    for start, end in pairwise(borders):
        lengths[start // tokens].append(end - start)
    parts = zip(tensor.split(1), lengths, strict=True)
    return [document for row, sizes in parts for document in row.split(sizes, dim=2)]
