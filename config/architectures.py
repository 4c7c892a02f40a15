"""Published models' sizes by name, for a run that starts from random weights.

    model = ModelConfig(architecture={"size": "gpt2-124m", "n_layer": 6}, tokenizer="openai-community/gpt2")

The figures are those of the makers' own config.json files; a count of parameters is the one that they publish.
"""

from typing import Any

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}


def _llama_3_rotations(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _llama_31(*shape: int) -> dict[str, Any]:
    return {**_LLAMA_3, **_shape(*shape, tie_word_embeddings=False), "rope_parameters": _llama_3_rotations(8.0)}


def _llama_32(*shape: int, head_dim: int) -> dict[str, Any]:
    return {
        **_LLAMA_3,
        **_shape(*shape, tie_word_embeddings=True, head_dim=head_dim),
        "rope_parameters": _llama_3_rotations(32.0),
    }


def _smollm2(*shape: int, theta: float = 100_000.0, std: float = 0.02) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "initializer_range": std,
        **_shape(*shape, tie_word_embeddings=True),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
    }


def _qwen25(*shape: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        **_shape(*shape, tie_word_embeddings=True),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2-124m": _gpt2(768, 12, 12),  # 124,439,808 parameters
    "gpt2-medium": _gpt2(1024, 24, 16),  # 354,823,168
    "gpt2-large": _gpt2(1280, 36, 20),  # 774,030,080
    "gpt2-xl": _gpt2(1600, 48, 25),  # 1,557,611,200
    "llama3.1-8b": _llama_31(4096, 14_336, 32, 32, 8),  # 8,030,261,248
    "llama3.1-70b": _llama_31(8192, 28_672, 80, 64, 8),  # 70,553,706,496
    "llama3.2-1b": _llama_32(2048, 8192, 16, 32, 8, head_dim=64),  # 1,235,814,400
    "llama3.2-3b": _llama_32(3072, 8192, 28, 24, 8, head_dim=128),  # 3,212,749,824
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, context=32_768),  # 494,032,768
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, context=131_072),  # 1,543,714,304
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, std=1 / 24),  # 134,515,008
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5),  # 361,821,120
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, theta=130_000.0),  # 1,711,376,384
}
"""Settings of a transformers config by the name that `model.architecture.size` takes."""


def expanded(architecture: dict[str, Any]) -> dict[str, Any]:
    """The fields of an architecture: those of its `size`, if it names one, with its own in their place.

    An unknown size counts as none; `config.model_constraints` refuses it.
    """
    own = {name: value for name, value in architecture.items() if name != "size"}
    return {**ARCHITECTURES.get(str(architecture.get("size")), {}), **own}
