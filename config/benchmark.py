"""What `scripts/benchmark.py` measures on: shapes of known models, what is trained, and what devices can do at best.

    architecture = SHAPES["llama-1b"]
    cases = [Case(**fields) for fields in PRESETS["gpu-1b"]]
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
    # karpathy/tinyllamas stories15M, stories42M and stories110M, with a longer context
    "llama-15m": _llama(288, 768, 6, 6, 6, vocab_size=32000, max_position_embeddings=16384, tie_word_embeddings=True),
    "llama-42m": _llama(512, 1376, 8, 8, 8, vocab_size=32000, max_position_embeddings=16384, tie_word_embeddings=True),
    "llama-110m": _llama(
        768, 2048, 12, 12, 12, vocab_size=32000, max_position_embeddings=16384, tie_word_embeddings=True
    ),
    # 32,000 x 128 numbers of its 4.9 million are the embedding's
    "llama-5m": _llama(128, 352, 4, 4, 4, vocab_size=32000, max_position_embeddings=16384, tie_word_embeddings=True),
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


def _at_lengths(**fields: Any) -> tuple[dict[str, Any], ...]:
    """Micro-batches of 16,384 tokens: as packs of 4,096 with short rows, and as one pack with long ones."""
    short = {"max_length": 4096, "micro_batch_rows": 4, "median_length": 300}
    long = {"max_length": 16384, "micro_batch_rows": 1, "median_length": 2000}
    return fields | short, fields | long


_EIGHT_BILLION = {"model": "llama-8b", "dtype": "bfloat16", "gradient_checkpointing": "full"}

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    # for the tests: seconds on a CPU
    "tiny": ({"model": "tiny", "max_length": 256, "median_length": 60, "steps": 2, "warmup_steps": 1},),
    # 2 packs x 1024 = 2,048 tokens/step
    "cpu-15m": ({"model": "llama-15m", "rows": "instruction", "max_length": 1024, "micro_batch_rows": 2},),
    # 1 pack x 1024 = 1,024 tokens/step; three steps are 6 x 135 M x 3,072 = 2.5 TFLOP, 16 s at 0.16 TFLOP/s
    "cpu-135m": ({"model": "llama-135m", "rows": "instruction", "max_length": 1024, "steps": 2, "warmup_steps": 1},),
    # 1.2 billion weights x 16 bytes (float32 weights, gradients and two moments) = 20 GB before activations
    "gpu-1b": _at_lengths(model="llama-1b"),
    # 8.0 billion x 2 bytes = 16 GB
    "gpu-8b-lora": _at_lengths(method="lora", **_EIGHT_BILLION),
    "gpu-8b-qlora": _at_lengths(method="qlora", **_EIGHT_BILLION),
    # 8.0 billion x 8 bytes (bfloat16 weights, gradients and two moments) = 64 GB
    "gpu-8b-full": _at_lengths(method="full", **_EIGHT_BILLION),
}
"""Cases of `scripts/benchmark.py step`, by the name that `--preset` takes: fields of scripts/benchmarking/case.py."""

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
