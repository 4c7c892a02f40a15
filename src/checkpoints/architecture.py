"""What a checkpoint's tensors compute: a Llama in typed fields, or any other model in the words of its config.json.

Formats that hold Llamas alone ask for the first with `as_llama`, which refuses the second by name.

    sizes = as_llama(checkpoint.architecture, "llama2c")
    sizes.tensor_shapes()["model.norm.weight"]
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class LlamaArchitecture:
    """What a Llama's tensors compute, in the words of Hugging Face's config.json."""

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

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return "llama"

    def config(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **asdict(self)}


@dataclass(frozen=True)
class OtherArchitecture:
    """A model that transformers knows, by its config.json."""

    settings: Mapping[str, Any] = field(hash=False)
    """The content of config.json, `model_type` included."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Tokens the model may attend over."""
    tie_word_embeddings: bool

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return self.settings["model_type"]

    def config(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        return dict(self.settings)


Architecture = LlamaArchitecture | OtherArchitecture

LLAMA_FIELDS = tuple(LlamaArchitecture.__dataclass_fields__)

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # the families' names for their number

# Settings of config.json that change nothing in what the tensors compute when they are evaluated.
_WITHOUT_EFFECT = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


def beyond_llama(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of model type `llama` sets and `LlamaArchitecture` does not have."""
    known = {*LLAMA_FIELDS, *_WITHOUT_EFFECT, "rope_theta", "rope_scaling"}
    return {name: settings[name] for name in sorted(settings.keys() - known)}


def check_layers(where: str, layers: int, tensors: int) -> None:
    """Compare a description with a file before each of its layers is given names, which a claim of 2**40 never ends.

    Args:
        where: the description's place and name for its layers.
        tensors: how many are stored; a layer has at least one.
    Raises:
        UserError: there are fewer tensors than layers.
    """
    if layers > tensors:
        raise UserError(f"{where}={layers}, but {tensors} tensors are stored; mend it, or give a complete checkpoint")


def check_config_layers(where: str, settings: Mapping[str, Any], tensors: int) -> None:
    """`check_layers` of a config.json, and of each part of it where it describes several models."""
    for name, value in settings.items():
        if isinstance(value, dict):
            check_config_layers(where, value, tensors)
        elif name in _LAYERS and isinstance(value, int):
            check_layers(f"{where}: {name}", value, tensors)


def as_llama(architecture: Architecture, target: str) -> LlamaArchitecture:
    """The architecture, where it is a Llama's.

    Args:
        target: the format that asks, for the message.
    Raises:
        UserError: it is another family's, or a Llama's with more settings than one has.
    """
    if isinstance(architecture, LlamaArchitecture):
        return architecture
    if architecture.model_type == "llama":
        raise UserError(
            f"config.json sets {beyond_llama(architecture.settings)}, which {target} cannot hold; remove what has no "
            "effect, or choose another --to"
        )
    raise UserError(
        f"model_type={architecture.model_type} cannot be held by {target}, which holds llama; choose another --to"
    )
