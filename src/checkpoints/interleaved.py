"""Llama in Meta's layout: its tensor names, its interleaved rotary pairs, and its evaluation from first principles.

Meta's code (and llama2.c) rotates neighbouring rows 2i and 2i+1 of each head together; transformers rotates rows i and
i + head_dim/2. The same model therefore has its query and key rows in another order.

Shapes: T tokens, V vocabulary, C hidden size, H heads, K key heads, D head size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, rms_norm, silu

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
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
YARN_FAST, YARN_SLOW = 32, 1
"""Turns in the original context from which YaRN keeps a wavelength, and up to which it stretches it in full."""

_TOP_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor by Meta's, such as `layers.0.attention.wq.weight`.

    Raises:
        KeyError: no Llama tensor has that name.
    """
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".", 2)
    if parts[0] != "layers":
        return f"{_TOP_NAMES[stem]}.{kind}"
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{kind}"


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
    """Heads in the rows of a rotated projection, its bias or its norm by either name; 0 for every other tensor."""
    part = name.split(".")[-2]
    if part in ("wq", "q_proj"):
        return architecture.num_attention_heads
    if part in ("wk", "k_proj"):
        return architecture.num_key_value_heads
    return int(part in ("q_norm", "k_norm"))  # one norm serves every head


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
    angles and norms alike. Biases of the attention's projections, and norms of queries and keys, are heeded where
    `tensors` has them, so that Qwen 2 and 3 are evaluated too.

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
        attention = self._attention_weights(f"{prefix}.attention.")
        states = [row_TC + self._attention(self.norm(row_TC, norm_C), attention) for row_TC in states]
        del attention
        norm_C = self.weight(f"{prefix}.ffn_norm")
        gate, down, up = (self.weight(f"{prefix}.feed_forward.w{number}") for number in (1, 2, 3))
        normed = [self.norm(row_TC, norm_C) for row_TC in states]
        return [
            row + (silu(inner @ gate.T) * (inner @ up.T)) @ down.T for row, inner in zip(states, normed, strict=True)
        ]

    def _attention_weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """Weights and biases of one attention by their names without `prefix`."""
        return {
            name.removeprefix(prefix): self.tensors[name].load().float()
            for name in self.tensors
            if name.startswith(prefix)
        }

    def _attention(self, normed_TC: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        sizes, length = self.sizes, len(normed_TC)

        def projected(states: torch.Tensor, name: str) -> torch.Tensor:
            return linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        angles_TF = torch.outer(torch.arange(length).double(), rotary_frequencies(sizes)).float()
        queries_THD, keys_TKD, values_TKD = (
            projected(normed_TC, name).unflatten(1, (-1, sizes.head_dim)) for name in ("wq", "wk", "wv")
        )
        if "q_norm.weight" in weights:
            queries_THD = rms_norm(queries_THD, (sizes.head_dim,), weights["q_norm.weight"], sizes.rms_norm_eps)
            keys_TKD = rms_norm(keys_TKD, (sizes.head_dim,), weights["k_norm.weight"], sizes.rms_norm_eps)
        scale = rotary_scale(sizes)
        queries_THD, keys_TKD = (scale * _rotate(states, angles_TF) for states in (queries_THD, keys_TKD))
        shared = sizes.num_attention_heads // sizes.num_key_value_heads
        keys_THD, values_THD = (states.repeat_interleave(shared, dim=1) for states in (keys_TKD, values_TKD))
        scores_HTT = torch.einsum("qhd,khd->hqk", queries_THD, keys_THD) / math.sqrt(sizes.head_dim)
        future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares_HTT = scores_HTT.masked_fill(future_TT, -math.inf).softmax(dim=-1)
        return projected(torch.einsum("hqk,khd->qhd", shares_HTT, values_THD).flatten(1), "wo")


def rotary_frequencies(architecture: LlamaArchitecture) -> torch.Tensor:
    """Radians a position of each pair, float64 (D / 2,), with the long wavelengths stretched as the scaling says.

    `linear` stretches every wavelength by `factor`. The others stretch long ones, keep short ones and mix the two
    between: `llama3` in proportion to the turns that a pair takes in the original context, `yarn` to the pair's place.

    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling),
        https://arxiv.org/abs/2309.00071 (YaRN)
    Raises:
        UserError: the scaling is of another kind.
    """
    size, rope = architecture.head_dim, architecture.rope_parameters
    base = float(rope["rope_theta"])
    frequencies = base ** (-torch.arange(0, size, 2).double() / size)
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif rope["rope_type"] == "yarn":

        def place(turns: float) -> float:
            """Where the pair stands that takes so many turns in the original context."""
            context = rope["original_max_position_embeddings"]
            return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = max(math.floor(place(YARN_FAST)), 0), min(math.ceil(place(YARN_SLOW)), size - 1)
        kept = 1 - ((torch.arange(size // 2).double() - first) / max(last - first, 1e-3)).clamp(0, 1)
    else:
        raise UserError(
            f"rope_type={rope['rope_type']} is beyond this evaluation, which knows default, linear, llama3 and yarn"
        )
    return frequencies * (kept + (1 - kept) / rope["factor"])


def rotary_scale(architecture: LlamaArchitecture) -> float:
    """What rotated queries and keys are multiplied by: 0.1 ln(factor) + 1 for `yarn`, else 1."""
    rope = architecture.rope_parameters
    return 0.1 * math.log(rope["factor"]) + 1 if rope["rope_type"] == "yarn" and rope["factor"] > 1 else 1.0
