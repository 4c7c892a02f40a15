"""Llama in Meta's layout: its tensor names, its interleaved rotary pairs, and its evaluation from first principles.

Meta's code (and llama2.c) rotates neighbouring rows 2i and 2i+1 of each head together; transformers rotates rows i and
i + head_dim/2. The same model therefore has its query and key rows in another order.

Shapes: T tokens, V vocabulary, C hidden size, H heads, K key heads, D head size.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import rms_norm, silu

from src.checkpoints.checkpoint import LazyTensor, LlamaArchitecture

# Meta's name of a layer's tensor -> Hugging Face's
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TOP_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor by Meta's, such as `layers.0.attention.wq.weight`.

    Raises:
        KeyError: no Llama tensor has that name.
    """
    parts = name.removesuffix(".weight").split(".", 2)
    if parts[0] != "layers":
        return f"{_TOP_NAMES['.'.join(parts)]}.weight"
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"


def pairs_to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows (H*D, ...) of a query or key projection from interleaved pairs to transformers' halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `pairs_to_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _heads_to_reorder(name: str, architecture: LlamaArchitecture) -> int:
    """Heads in the rows of a rotated projection by either of its names; 0 for every other tensor."""
    if name.endswith((".wq.weight", ".q_proj.weight")):
        return architecture.num_attention_heads
    if name.endswith((".wk.weight", ".k_proj.weight")):
        return architecture.num_key_value_heads
    return 0


def to_hugging_face(architecture: LlamaArchitecture, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by Meta's names -> the same by Hugging Face names, reordered as they are loaded."""

    def converted(name: str, tensor: LazyTensor) -> LazyTensor:
        heads = _heads_to_reorder(name, architecture)
        if not heads:
            return tensor
        return LazyTensor(tensor.shape, tensor.dtype, lambda: pairs_to_halves(tensor.load(), heads))

    return {hugging_face_name(name): converted(name, tensor) for name, tensor in tensors.items()}


def from_hugging_face(architecture: LlamaArchitecture, name: str, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    """Load the tensor that Meta calls `name` from tensors by Hugging Face names."""
    weight = tensors[hugging_face_name(name)].load()
    heads = _heads_to_reorder(name, architecture)
    return halves_to_pairs(weight, heads) if heads else weight


def _rotate(states_THD: torch.Tensor, angles_TF: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of each head by the angle of their place; F is D/2."""
    cosine, sine = angles_TF.cos()[:, None], angles_TF.sin()[:, None]
    even, odd = states_THD[..., 0::2], states_THD[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


@torch.no_grad()
def interleaved_logits(
    architecture: LlamaArchitecture, tensors: Mapping[str, LazyTensor], token_ids: Sequence[int]
) -> torch.Tensor:
    """Evaluate Llama on one row of tokens from tensors by Meta's names, unpermuted, one layer in memory at a time.

    It shares no code with transformers, so agreement with a converted model speaks for names, shapes, row order, rotary
    angles and norms alike. Plain rotary embedding and no biases.

    Args:
        token_ids: T ids, 1 <= T <= the model's context.
    Returns:
        float32 logits (T, V).
    """

    def weight(name: str) -> torch.Tensor:
        return tensors[f"{name}.weight"].load().float()

    def norm(states_TC: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(states_TC, (architecture.hidden_size,), weight(name), architecture.rms_norm_eps)

    size = architecture.head_dim
    frequencies = float(architecture.rope_parameters["rope_theta"]) ** (-torch.arange(0, size, 2).double() / size)
    angles_TF = torch.outer(torch.arange(len(token_ids)).double(), frequencies).float()
    future_TT = torch.ones(len(token_ids), len(token_ids), dtype=torch.bool).triu(1)
    states_TC = weight("tok_embeddings")[torch.tensor(token_ids)]
    for layer in range(architecture.num_hidden_layers):
        prefix = f"layers.{layer}"
        normed_TC = norm(states_TC, f"{prefix}.attention_norm")
        queries_THD, keys_TKD, values_TKD = (
            (normed_TC @ weight(f"{prefix}.attention.{name}").T).unflatten(1, (-1, size)) for name in ("wq", "wk", "wv")
        )
        queries_THD, keys_TKD = _rotate(queries_THD, angles_TF), _rotate(keys_TKD, angles_TF)
        shared = architecture.num_attention_heads // architecture.num_key_value_heads
        keys_THD, values_THD = (states.repeat_interleave(shared, dim=1) for states in (keys_TKD, values_TKD))
        scores_HTT = torch.einsum("qhd,khd->hqk", queries_THD, keys_THD) / math.sqrt(size)
        shares_HTT = scores_HTT.masked_fill(future_TT, -math.inf).softmax(dim=-1)
        mixed_TC = torch.einsum("hqk,khd->qhd", shares_HTT, values_THD).flatten(1)
        states_TC = states_TC + mixed_TC @ weight(f"{prefix}.attention.wo").T
        normed_TC = norm(states_TC, f"{prefix}.ffn_norm")
        gated = silu(normed_TC @ weight(f"{prefix}.feed_forward.w1").T)
        gated = gated * (normed_TC @ weight(f"{prefix}.feed_forward.w3").T)
        states_TC = states_TC + gated @ weight(f"{prefix}.feed_forward.w2").T
    head = "tok_embeddings" if architecture.tie_word_embeddings else "output"
    return norm(states_TC, "norm") @ weight(head).T
