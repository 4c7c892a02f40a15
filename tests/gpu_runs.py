"""A model, rows and runs that are small, and large enough for the kernels of a GPU; on a CPU where there is none.

model, losses = run(tmp_path, small_model(), precision="bf16")
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from config.schema import EvaluationConfig, ModelConfig, OptimConfig, TrackingConfig, TrainingConfig
from src.attention import register_documents
from src.model import load_model, load_settings
from src.packing import IGNORED, PackedRows
from src.trainer import SFTTrainer
from src.training_arguments import training_arguments
from utils.distributed import accelerator_name

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU and "GPU_TESTS_ON_CPU" not in os.environ,
        reason="needs a CUDA device; with GPU_TESTS_ON_CPU=1 the same checks run on the CPU",
    ),
]
"""Marks of tests that are for a GPU."""
DEVICE = torch.device(accelerator_name())
VOCABULARY, LENGTH = 256, 192

# Largest relative error of a loss and of the norm of a gradient, against float64 on the CPU. float32 has 24 bits, of
# which sums over a few hundred terms leave 1e-6. bf16 has 8, so that a product is off by up to 4e-3; over layers the
# errors of a gradient add up to some 1e-2, and those of a loss, a mean over tokens, cancel out.
BOUNDS = {"float32": (1e-5, 1e-5), "bf16": (1e-3, 5e-2)}


def small_model(*, attention="sdpa", seed=0, **settings):
    """Heads of 64, which every attention kernel takes, and weights large enough that attention matters."""
    register_documents()
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape | settings))
    model.set_attn_implementation(attention)
    return model


def small_tokenizer():
    words = {f"t{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t1")), pad_token="t0", eos_token="t2"
    )


def uneven_rows(count=24, seed=0):
    """Rows of 8 to 90 tokens, supervised from a place that differs much; each token foretells the next."""
    random = np.random.default_rng(seed)
    ids, labels = [], []
    for _ in range(count):
        start, step = int(random.integers(3, VOCABULARY)), int(random.integers(1, 4))
        row = [3 + (start + step * place) % (VOCABULARY - 3) for place in range(int(random.integers(8, 91)))]
        first = int(random.integers(1, len(row)))
        ids.append(row)
        labels.append([IGNORED] * first + row[first:])
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def autocast(precision):
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def gradient_of(model):
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])


def weights_of(model):
    return torch.cat([parameter.detach().flatten().double().cpu() for parameter in model.parameters()])


def difference(one, other):
    """Norm of the difference, relative to that of `other`."""
    return ((one - other).norm() / other.norm()).item()


def reference(rows, **settings):
    """Mean loss and gradient from each row alone, from full logits, in float64 on the CPU."""
    model = small_model(attention="eager", **settings).double()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        tokens += int((labels != IGNORED).sum())
    (total / tokens).backward()
    return (total / tokens).item(), gradient_of(model)


class Steps(TrainerCallback):
    """Counts the optimizer steps that were taken here, whatever the state says."""

    taken = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.taken += 1


def build(
    folder,
    model,
    *,
    rows=None,
    packing=True,
    micro=2,
    accumulation=2,
    steps=6,
    optimizer="adamw_torch_fused",
    rate=1e-3,
    precision="float32",
    save_every=None,
    log_every=1,
    callbacks=(),
    offload=False,
):
    """The project's trainer on the device."""
    args = training_arguments(
        folder,
        OptimConfig(name=optimizer, learning_rate=rate, schedule="constant", max_grad_norm=None),
        TrainingConfig(
            max_steps=steps,
            micro_batch_rows=micro,
            accumulation_steps=accumulation,
            log_every_steps=log_every,
            save_every_steps=save_every,
            precision=precision,
        ),
        EvaluationConfig(),
        TrackingConfig(),
    )
    assert args.device.type == DEVICE.type
    packs = PackedRows(rows or uneven_rows(), max_length=LENGTH, packing=packing)
    return SFTTrainer(
        model=model,
        args=args,
        tokenizer=small_tokenizer(),
        train_packs=packs,
        callbacks=callbacks,
        activation_offload=offload,
    )


def losses_of(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def run(folder, model, **settings):
    trainer = build(folder, model, **settings)
    trainer.train()
    return trainer, losses_of(trainer)


def peak_memory(work):
    """Bytes above what was held before, at most, while `work` runs; None on a CPU."""
    if not HAS_GPU:
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def nf4_model(folder, bitsandbytes):
    """The small model from a checkpoint, with every linear layer but the head in four bits."""
    small_model().to(torch.bfloat16).save_pretrained(folder / "weights")
    config = ModelConfig(path=str(folder / "weights"), quantization="nf4", dtype="bfloat16")
    words = small_tokenizer()
    model = load_model(config, load_settings(config, words), words, trains_all=False)
    quantized = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 7 * 3
    assert {module.weight.dtype for module in quantized} == {torch.uint8}
    assert {module.weight.quant_state.quant_type for module in quantized} == {"nf4"}
    return model


def launch(folder, *options, **environment):
    """Run train.py from scratch on the embedded default's data; its metrics, and the run's folder."""
    data = ROOT / "config" / "data"
    recipe = {
        "model": {
            "architecture": {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 512,
            },
            "tokenizer": str(data / "smol_tokenizer.json"),
            "chat_template": str(data / "smol_chat_template.jinja"),
            "special_tokens": {"eos_token": "<|im_end|>"},
        },
        "data": {"train": [{"path": str(data / "smol_train.jsonl"), "max_rows": 800}], "max_length": 256},
        "optim": {"learning_rate": 2e-3},
        "training": {"micro_batch_rows": 4, "log_every_steps": 1, "save_every_steps": None},
        "output": {"folder": str(folder), "name": "run"},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(folder / "recipe.yaml"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line], folder / "run"


@pytest.fixture(autouse=True)
def full_float32():
    """No TF32, whose products have 11 bits; for every test of a module that names this."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
