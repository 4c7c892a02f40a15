"""Llama in Meta's layout: its tensor names, its interleaved rotary pairs, and its evaluation from first principles.

Meta's code (and llama2.c) rotates neighbouring rows 2i and 2i+1 of each head together; transformers rotates rows i and
i + head_dim/2. The same model therefore has its query and key rows in another order.

Shapes: T tokens, V vocabulary, C hidden size, H heads, K key heads, D head size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm, silu

from src.checkpoints.architecture import LlamaArchitecture
from src.checkpoints.checkpoint import LazyTensor, Rounding, rounded
from utils.errors import UserError

HEAD_ROWS = 2**14
"""Rows of the head that are multiplied together."""

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


def shapes_by_meta_name(architecture: LlamaArchitecture) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by Meta's name, in the model's order; a tied head is not among them."""
    layer_names = {theirs: own for own, theirs in _LAYER_NAMES.items()}
    top_names = {theirs: own for own, theirs in _TOP_NAMES.items()}

    def own_name(name: str) -> str:
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] == "layers":
            return f"layers.{parts[1]}.{layer_names[parts[2]]}.weight"
        return f"{top_names[name.removesuffix('.weight')]}.weight"

    return {own_name(name): shape for name, shape in architecture.tensor_shapes().items()}


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
    architecture: LlamaArchitecture,
    tensors: Mapping[str, LazyTensor],
    rows: Sequence[Sequence[int]],
    rounding: Rounding | None = None,
) -> list[torch.Tensor]:
    """Evaluate Llama from tensors by Meta's names, unpermuted, one layer in memory at a time.

    It shares no code with transformers, so agreement with a converted model speaks for names, shapes, row order, rotary
    angles and norms alike. No biases.

    Args:
        rows: token ids, each row of 1 to as many as the model's context.
        rounding: what every weight goes through first, by its Hugging Face name.
    Returns:
        For each row float32 logits (T, V).
    """
    model = _Interleaved(architecture, rounded(tensors, rounding, hugging_face_name))
    # Float32 copies of a whole embedding and head would take more memory than all else.
    embedding_VC = model.tensors["tok_embeddings.weight"].load()
    states = [embedding_VC[torch.tensor(row)].float() for row in rows]
    del embedding_VC
    for layer in range(architecture.num_hidden_layers):
        states = model.layer(f"layers.{layer}", states)
    final_C = model.weight("norm")
    normed = [model.norm(states_TC, final_C) for states_TC in states]
    head_VC = model.tensors["tok_embeddings.weight" if architecture.tie_word_embeddings else "output.weight"].load()
    parts = [[row_TC @ part_VC.float().T for row_TC in normed] for part_VC in head_VC.split(HEAD_ROWS)]
    return [torch.cat(row_parts, dim=1) for row_parts in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Interleaved:
    """A Llama whose weights are loaded when they are used."""

    sizes: LlamaArchitecture
    tensors: Mapping[str, LazyTensor]

    def weight(self, name: str) -> torch.Tensor:
        return self.tensors[f"{name}.weight"].load().float()

    def norm(self, states_TC: torch.Tensor, weight_C: torch.Tensor) -> torch.Tensor:
        return rms_norm(states_TC, (self.sizes.hidden_size,), weight_C, self.sizes.rms_norm_eps)

    def layer(self, prefix: str, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """The rows after one layer, (T, C) each."""
        norm_C = self.weight(f"{prefix}.attention_norm")
        projections = [self.weight(f"{prefix}.attention.{name}") for name in ("wq", "wk", "wv", "wo")]
        states = [row_TC + self._attention(self.norm(row_TC, norm_C), *projections) for row_TC in states]
        del projections
        norm_C = self.weight(f"{prefix}.ffn_norm")
        gate, down, up = (self.weight(f"{prefix}.feed_forward.w{number}") for number in (1, 2, 3))
        normed = [self.norm(row_TC, norm_C) for row_TC in states]
        return [
            row + (silu(inner @ gate.T) * (inner @ up.T)) @ down.T for row, inner in zip(states, normed, strict=True)
        ]

    def _attention(
        self, normed_TC: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, wo: torch.Tensor
    ) -> torch.Tensor:
        sizes, length = self.sizes, len(normed_TC)
        angles_TF = torch.outer(torch.arange(length).double(), rotary_frequencies(sizes)).float()
        queries_THD, keys_TKD, values_TKD = (
            (normed_TC @ weight.T).unflatten(1, (-1, sizes.head_dim)) for weight in (wq, wk, wv)
        )
        queries_THD, keys_TKD = _rotate(queries_THD, angles_TF), _rotate(keys_TKD, angles_TF)
        shared = sizes.num_attention_heads // sizes.num_key_value_heads
        keys_THD, values_THD = (states.repeat_interleave(shared, dim=1) for states in (keys_TKD, values_TKD))
        scores_HTT = torch.einsum("qhd,khd->hqk", queries_THD, keys_THD) / math.sqrt(sizes.head_dim)
        future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares_HTT = scores_HTT.masked_fill(future_TT, -math.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", shares_HTT, values_THD).flatten(1) @ wo.T


def rotary_frequencies(architecture: LlamaArchitecture) -> torch.Tensor:
    """Radians a position of each pair, float64 (D / 2,), with Llama 3.1's stretching of long wavelengths.

    Wavelengths above `original context / low_freq_factor` are stretched by `factor`, those below `original context /
    high_freq_factor` are kept, and between them the two are mixed in proportion to the turns in the original context.

    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling)
    Raises:
        UserError: the scaling is of another kind.
    """
    size, rope = architecture.head_dim, architecture.rope_parameters
    frequencies = float(rope["rope_theta"]) ** (-torch.arange(0, size, 2).double() / size)
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] != "llama3":
        raise UserError(f"rope_type={rope['rope_type']} is beyond this evaluation, which knows default and llama3")
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])
