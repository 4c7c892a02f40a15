"""The one type that every checkpoint format is read to and written from.

A reader gives a `Checkpoint`: a description in plain fields, tensors by their Hugging Face names that are loaded one by
one on demand, a tokenizer, generation settings, and the source's own evaluation, which the certificate of a conversion
compares with that of what was written. A writer takes a `Checkpoint` and refuses, by name, a field that its format
cannot hold.

    checkpoint = llama2c.read(Path("model.bin"), Path("tokenizer.bin"))
    checkpoint.tensors["model.norm.weight"].load()
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from src.checkpoints.pieces import ScoredPieces
from utils.errors import UserError


@dataclass(frozen=True)
class LlamaArchitecture:
    """What a Llama's tensors compute, in the words of Hugging Face's config.json.

    Another family of models joins as another dataclass beside this one, with its own `tensor_shapes`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """Tokens the model may attend over."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    """Whether the head is the embedding's own tensor; `lm_head.weight` is then absent from the tensors."""
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}, hash=False
    )
    """Rotary embedding, as transformers' `rope_parameters`."""
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its Hugging Face name, in the model's order."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            linear = {
                "self_attn.q_proj": (queries, hidden, self.attention_bias),
                "self_attn.k_proj": (keys, hidden, self.attention_bias),
                "self_attn.v_proj": (keys, hidden, self.attention_bias),
                "self_attn.o_proj": (hidden, queries, self.attention_bias),
                "mlp.gate_proj": (wide, hidden, self.mlp_bias),
                "mlp.up_proj": (wide, hidden, self.mlp_bias),
                "mlp.down_proj": (hidden, wide, self.mlp_bias),
            }
            for name, (rows, columns, bias) in linear.items():
                shapes[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"model.layers.{layer}.{name}.bias"] = (rows,)
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
            shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays in its file until it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    """Reads the tensor anew at each call, so that the caller alone decides how long it stays in memory."""

    @property
    def size_in_bytes(self) -> int:
        """Memory that the loaded tensor takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer in Hugging Face's own files, which only need copying to another Hugging Face folder."""

    paths: tuple[Path, ...]

    @property
    def tokenizer_json(self) -> Path:
        """The file that holds vocabulary, merges and every step of tokenization."""
        return next(path for path in self.paths if path.name == "tokenizer.json")


@dataclass(frozen=True)
class Generation:
    """How text is drawn from the model: the ids of the tokens that bound it."""

    bos_token_id: int | None
    stop_token_ids: tuple[int, ...]
    """Tokens that end a text, the tokenizer's own end token first."""
    pad_token_id: int | None
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further settings, such as `temperature`, by transformers' names."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in no particular format."""

    inputs: tuple[Path, ...]
    """The files it was read from."""
    architecture: LlamaArchitecture
    tensors: Mapping[str, LazyTensor]
    """By Hugging Face name, with rotary pairs in halves as transformers has them."""
    tokenizer: ScoredPieces | TokenizerFiles
    generation: Generation
    logits: Callable[[Sequence[int]], torch.Tensor]
    """The source's own evaluation: token ids of one row to float32 logits of shape (tokens, vocabulary)."""
    encode: Callable[[str], list[int]]
    """The source's own tokenization, with the begin token in front."""

    def check_tensors(self) -> None:
        """Compare the tensors with what the architecture needs.

        Raises:
            UserError: a tensor is missing, is not one of the architecture's, or has another shape.
        """
        shapes = self.architecture.tensor_shapes()
        missing, unknown = shapes.keys() - self.tensors.keys(), self.tensors.keys() - shapes.keys()
        if missing or unknown:
            raise UserError(
                f"{self.inputs[0]} lacks the tensors {sorted(missing)} and has {sorted(unknown)}, which its "
                "description does not allow; give a complete Llama checkpoint"
            )
        for name, shape in shapes.items():
            if tuple(self.tensors[name].shape) != shape:
                raise UserError(
                    f"{self.inputs[0]}: {name} has shape {tuple(self.tensors[name].shape)}, its description asks for "
                    f"{shape}; mend the description or the tensor"
                )
