"""The families of models that pass through GGUF: their fields as GGUF's metadata, their tensors by GGUF's names.

Llama, Mistral, Qwen 2 and Qwen 3 compute the same but for biases and norms of queries and keys, so the fields of a
Llama describe each. What differs in the file is the order of query and key rows: llama.cpp rotates neighbouring rows in
what it calls `llama`, and rows half a head apart, as transformers does, in the others.

    family, sizes = family_of(checkpoint.architecture)
    metadata(family, sizes)["llama.block_count"]

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig

from src.checkpoints.architecture import (
    LLAMA_FIELDS,
    Architecture,
    LlamaArchitecture,
    OtherArchitecture,
    as_llama,
    beyond_llama,
    check_layers,
)
from src.checkpoints.checkpoint import LazyTensor
from src.checkpoints.gguf_files import Content
from src.checkpoints.interleaved import (
    YARN_FAST,
    YARN_SLOW,
    from_hugging_face,
    hugging_face_name,
    rotary_frequencies,
    to_hugging_face,
)
from utils.errors import UserError, some

FREQUENCY_FACTORS = "rope_freqs.weight"
"""The tensor of what each rotary wavelength is stretched by, float32 (head size / 2,); `llama3` scaling's form."""

# GGUF's name of a layer's tensor -> Meta's, whose Hugging Face name `interleaved` knows
_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}
_TOP_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}
# Further settings of config.json that have no effect while no window slides, which is checked.
_OF_WINDOWS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})


@dataclass(frozen=True)
class Family:
    """A family of models in a GGUF file."""

    name: str
    """llama.cpp's name, which leads every key."""
    in_pairs: bool
    """Whether rows of queries and keys that turn together are neighbours in the file."""
    biases: tuple[str, ...] = ()
    """The projections of the attention that always have a bias, by GGUF's names."""
    norms: tuple[str, ...] = ()
    """The norms beside those of Llama, by GGUF's names."""


FAMILIES = {
    "llama": Family("llama", in_pairs=True),
    "mistral": Family("llama", in_pairs=True),
    "qwen2": Family("qwen2", in_pairs=False, biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Family("qwen3", in_pairs=False, norms=("attn_q_norm", "attn_k_norm")),
}
"""By transformers' `model_type`."""


def meta_name(name: str) -> str:
    """Meta's name of a tensor by GGUF's, such as `blk.0.attn_q.weight`.

    Raises:
        KeyError: no tensor of these families has that name.
    """
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".", 2)
    if parts[0] != "blk":
        return f"{_TOP_NAMES[stem]}.{kind}"
    return f"layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{kind}"


def family_of(architecture: Architecture) -> tuple[Family, LlamaArchitecture]:
    """The family that holds a model, and its fields as a Llama's.

    Raises:
        UserError: no family holds it, or a setting has an effect that none has; the setting is named.
    """
    kind = architecture.model_type
    if kind not in FAMILIES:
        raise UserError(
            f"model_type={kind} cannot be held by gguf here, which holds {', '.join(FAMILIES)}; choose another --to"
        )
    if isinstance(architecture, LlamaArchitecture) or kind == "llama":
        sizes = as_llama(architecture, "gguf")
    else:
        sizes = _sizes(architecture.settings)
    for name, value in {"hidden_act": "silu", "mlp_bias": False}.items():
        if (given := getattr(sizes, name)) != value:
            raise UserError(f"{name}={given} cannot be held by gguf, where it is {value}; choose another --to")
    _check_rope(sizes.rope_parameters)
    return FAMILIES[kind], sizes


def _sizes(settings: Mapping[str, Any]) -> LlamaArchitecture:
    """The fields of a Llama from a config.json of a family beside it."""
    values = {name: value for name, value in settings.items() if name != "model_type"}
    config = AutoConfig.for_model(settings["model_type"], **values)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise UserError(
            f"sliding_window={window} is below max_position_embeddings={config.max_position_embeddings}, which "
            "llama.cpp does not heed in this family; lower max_position_embeddings to it, or choose another --to"
        )
    if unknown := {name: value for name, value in beyond_llama(values).items() if name not in _OF_WINDOWS}:
        raise UserError(f"config.json sets {unknown}, which gguf cannot hold; remove what has no effect")
    fields = {name: getattr(config, name) for name in LLAMA_FIELDS if getattr(config, name, None) is not None}
    fields.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    return LlamaArchitecture(**fields)


def _check_rope(rope: Mapping[str, Any]) -> None:
    """Raises: UserError, naming a rotary scaling, or a parameter of one, that llama.cpp computes otherwise."""
    needed = {
        "default": {"rope_theta"},
        "linear": {"rope_theta", "factor"},
        "llama3": {
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
        "yarn": {"rope_theta", "factor", "original_max_position_embeddings"},
    }
    fixed = {"beta_fast": YARN_FAST, "beta_slow": YARN_SLOW, "truncate": True, "partial_rotary_factor": 1.0}
    kind = rope.get("rope_type", "default")
    if kind not in needed or needed[kind] - rope.keys():
        raise UserError(
            f"rope_parameters={dict(rope)} cannot be held by gguf here, which holds the types {', '.join(needed)} with "
            f"{sorted(needed.get(kind, ()))}; choose another --to"
        )
    for name, value in rope.items():
        if name not in {"rope_type", *needed[kind]} and value != fixed.get(name):
            raise UserError(
                f"rope_parameters.{name}={value} cannot be held by gguf, where it is {fixed.get(name)}; choose another "
                "--to"
            )


def metadata(family: Family, sizes: LlamaArchitecture) -> dict[str, Any]:
    """The fields by GGUF's keys, `general.architecture` left out."""
    rope = sizes.rope_parameters
    values: dict[str, Any] = {
        "context_length": sizes.max_position_embeddings,
        "embedding_length": sizes.hidden_size,
        "block_count": sizes.num_hidden_layers,
        "feed_forward_length": sizes.intermediate_size,
        "attention.head_count": sizes.num_attention_heads,
        "attention.head_count_kv": sizes.num_key_value_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": float(sizes.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": sizes.head_dim,
        "vocab_size": sizes.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = rope["rope_type"]
        values["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{family.name}.{key}": value for key, value in values.items()}


def frequency_factors(sizes: LlamaArchitecture) -> torch.Tensor | None:
    """What llama3's scaling stretches each wavelength by, float32 (D / 2,); None for another scaling."""
    if sizes.rope_parameters["rope_type"] != "llama3":
        return None
    plain = replace(sizes, rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_parameters["rope_theta"]})
    return (rotary_frequencies(plain) / rotary_frequencies(sizes)).float()


def tensor_names(family: Family, sizes: LlamaArchitecture) -> Iterator[str]:
    """GGUF's names of every tensor in the order of the layers."""
    yield "token_embd.weight"
    biases = ("attn_q", "attn_k", "attn_v", "attn_output") if sizes.attention_bias else family.biases
    for layer in range(sizes.num_hidden_layers):
        for name in _LAYER_NAMES:
            if not name.endswith(("q_norm", "k_norm")) or name in family.norms:
                yield f"blk.{layer}.{name}.weight"
            if name in biases:
                yield f"blk.{layer}.{name}.bias"
    yield "output_norm.weight"
    if not sizes.tie_word_embeddings:
        yield "output.weight"


def to_file(family: Family, sizes: LlamaArchitecture, name: str, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    """Load the tensor that GGUF calls `name`, its rows in the file's order, from tensors by Hugging Face names."""
    if family.in_pairs:
        return from_hugging_face(sizes, meta_name(name), tensors)
    return tensors[hugging_face_name(meta_name(name))].load()


def from_file(
    family: Family, sizes: LlamaArchitecture, content: Content
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """A file's tensors by Hugging Face names in transformers' order, and by Meta's in interleaved pairs.

    Raises:
        UserError: a tensor is missing or is none of the family's.
    """
    wanted = set(tensor_names(family, sizes))
    found = content.tensors.keys() - {FREQUENCY_FACTORS}
    if wanted != found:
        raise UserError(
            f"{content.path} lacks the tensors {some(wanted - found)} and has {some(found - wanted)}, which a "
            f"{family.name} does not have; give a complete file"
        )
    by_meta = {meta_name(name): content.tensors[name] for name in tensor_names(family, sizes)}
    if family.in_pairs:
        return to_hugging_face(sizes, by_meta), by_meta
    tensors = {hugging_face_name(name): tensor for name, tensor in by_meta.items()}

    def in_pairs(name: str, tensor: LazyTensor) -> LazyTensor:
        return replace(tensor, load=lambda: from_hugging_face(sizes, name, tensors))

    return tensors, {name: in_pairs(name, tensor) for name, tensor in by_meta.items()}


def read_architecture(content: Content) -> tuple[Family, LlamaArchitecture, Architecture]:
    """A file's family, its fields as a Llama's, and the architecture that they are.

    Raises:
        UserError: the family is not served, a key is missing, or the rotary scaling is beyond the served ones.
    """
    name = content.value("general.architecture", str)
    served = {family.name: family for family in FAMILIES.values()}
    if name not in served:
        raise UserError(f"{content.path}: general.architecture={name} is not served, only {', '.join(served)}")
    family = served[name]

    def value(key: str, *kinds: type) -> Any:
        return content.value(f"{name}.{key}", *kinds)

    def has(key: str) -> bool:
        return f"{name}.{key}" in content.metadata

    if has("expert_count") and value("expert_count", int):
        raise UserError(f"{content.path}: {name}.expert_count={value('expert_count', int)}; experts are not served")
    if "token_embd.weight" not in content.tensors:
        raise UserError(f"{content.path} lacks token_embd.weight; give a complete file")
    hidden, heads = value("embedding_length", int), value("attention.head_count", int)
    check_layers(f"{content.path}: {name}.block_count", value("block_count", int), len(content.tensors))
    sizes = LlamaArchitecture(
        vocab_size=content.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length", int),
        num_hidden_layers=value("block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", int) if has("attention.head_count_kv") else heads,
        head_dim=value("attention.key_length", int) if has("attention.key_length") else hidden // max(heads, 1),
        max_position_embeddings=value("context_length", int),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon", float),
        tie_word_embeddings="output.weight" not in content.tensors,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias="blk.0.attn_output.bias" in content.tensors,
    )
    sizes = replace(sizes, rope_parameters=_read_rope(content, name, sizes))
    if name == "llama":
        return family, sizes, sizes
    settings = {key: value for key, value in sizes.config().items() if key not in ("mlp_bias", "architectures")}
    if name == "qwen2":
        settings = {key: settings[key] for key in settings if key not in ("attention_bias", "head_dim")}
    return (
        family,
        sizes,
        OtherArchitecture(
            settings | {"model_type": name}, sizes.vocab_size, sizes.max_position_embeddings, sizes.tie_word_embeddings
        ),
    )


def _read_rope(content: Content, name: str, sizes: LlamaArchitecture) -> dict[str, Any]:
    """transformers' `rope_parameters` of a file."""
    prefix = f"{name}.rope."
    base = content.value(f"{prefix}freq_base", float) if f"{prefix}freq_base" in content.metadata else 10000.0
    plain = {"rope_type": "default", "rope_theta": base}
    turned = content.metadata.get(f"{prefix}dimension_count", sizes.head_dim)
    if turned != sizes.head_dim:
        raise UserError(f"{content.path}: {prefix}dimension_count={turned} is not the head size {sizes.head_dim}")
    kind = content.metadata.get(f"{prefix}scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{content.path}: {prefix}scaling.type={kind} is not served, only none, linear and yarn")
    known = {f"{prefix}scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned")}
    if unknown := {key for key in content.metadata if key.startswith(f"{prefix}scaling.")} - known:
        raise UserError(f"{content.path}: {sorted(unknown)} are not served; convert from the model's own files")
    if FREQUENCY_FACTORS in content.tensors:
        factors = content.tensors[FREQUENCY_FACTORS].load().double().flatten()
        if kind != "none":
            raise UserError(f"{content.path} has both {FREQUENCY_FACTORS} and {prefix}scaling.type={kind}")
        return _llama3(content, replace(sizes, rope_parameters=plain), factors)
    if kind == "none":
        return plain
    plain |= {"rope_type": kind, "factor": content.value(f"{prefix}scaling.factor", float)}
    if kind == "yarn":
        plain["original_max_position_embeddings"] = content.value(f"{prefix}scaling.original_context_length", int)
    return plain


def _llama3(content: Content, plain: LlamaArchitecture, factors: torch.Tensor) -> dict[str, Any]:
    """Parameters of llama3's scaling that give a file's factors.

    A wavelength's share `1 / f` grows linearly with its frequency where it is neither kept nor stretched in full, which
    tells two of the three parameters; the low factor is 1 in every model that is known, and only ratios matter. Each
    guess is held to the factors themselves.

    Raises:
        UserError: none does.
    """
    largest, frequencies = float(factors.max()), rotary_frequencies(plain)
    guesses = [(4.0, 2**power) for power in range(4, 20)]
    within = (factors > 1 + 1e-6) & (factors < largest - 1e-4)
    if within.any():
        share = (1 / factors[within] - 1 / largest) / (1 - 1 / largest)
        # share = (turns - 1) / (high - 1) with turns = original * frequency / 2 pi
        turning = 2 * math.pi / frequencies[within]
        guesses.insert(0, (4.0, round(float((turning * (3 * share + 1))[0]))))
    if within.sum() >= 2:
        rows = torch.stack((1 / turning, torch.ones_like(share)), dim=1)
        slope, shift = (float(each) for each in torch.linalg.lstsq(rows, share[:, None]).solution.flatten())
        guesses.append((float(round(1 - 1 / shift)), round(-slope / shift)))
        guesses.append((1 - 1 / shift, -slope / shift))
    for high, original in guesses:
        rope = {
            "rope_type": "llama3",
            "rope_theta": plain.rope_parameters["rope_theta"],
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if high > 1 and original > 0:
            found = frequency_factors(replace(plain, rope_parameters=rope))
            if found.shape == factors.shape and torch.allclose(found.double(), factors, rtol=1e-5, atol=0):
                return rope
    raise UserError(
        f"{content.path}: {FREQUENCY_FACTORS} is not llama3's scaling with low_freq_factor=1; convert from the model's "
        "own files"
    )
