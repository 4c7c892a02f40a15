"""What `scripts/benchmark.py` measures on: shapes of known models, and what devices can do at best.

    architecture = SHAPES["llama-1b"]
    peak = peak_tflops(torch.cuda.get_device_name())

Only shapes are taken from a model: its weights are random, so speed and memory are its own and losses are not.
"""

from typing import Any


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    # for the tests: a second on a CPU
    "tiny": _llama(64, 128, 2, 4, 2, vocab_size=512, max_position_embeddings=2048, tie_word_embeddings=True),
    # HuggingFaceTB/SmolLM2-135M
    "llama-135m": _llama(576, 1536, 30, 9, 3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True),
    # meta-llama/Llama-3.2-1B
    "llama-1b": _llama(
        2048, 8192, 16, 32, 8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True
    ),
    # meta-llama/Llama-3.2-3B
    "llama-3b": _llama(
        3072, 8192, 28, 24, 8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True
    ),
    # meta-llama/Llama-3.1-8B
    "llama-8b": _llama(
        4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False
    ),
}
"""Settings of a transformers config, by the name that `--model` takes."""

PEAK_TFLOPS: dict[str, float] = {
    # NVIDIA's data sheets, bf16 tensor cores; where a sheet gives the figure with sparsity, half of it.
    "H200 NVL": 836.0,
    "H200": 989.0,
    "H100 NVL": 836.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
}
"""Dense bf16 TFLOP/s at best, by a part of the device's name; the first part that fits counts."""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s that a device's maker states, or None for a device that is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)
