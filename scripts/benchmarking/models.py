"""The model of a case, with the same random weights for every contender, and what it trains with.

model = build_model(case, weights, attention="sdpa")
args = arguments(case, folder)
"""

from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.training_args import TrainingArguments

from config.benchmark import SHAPES
from config.schema import AdapterConfig, EvaluationConfig, ModelConfig, OptimConfig, TrackingConfig, TrainingConfig
from scripts.benchmarking.case import Case
from scripts.benchmarking.rows import FIRST_ID
from src.activations import recompute_activations
from src.adapters import add_adapter
from src.attention_choice import prove_attention
from src.model import load_model, load_settings
from src.training_arguments import training_arguments, uses_autocast
from utils.distributed import accelerator_name
from utils.errors import UserError

OPTIM = OptimConfig(name="adamw_torch_fused", learning_rate=1e-4, schedule="constant")
"""How every contender steps its weights."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of special tokens alone: rows are ids from the start."""
    words = {"<pad>": 0, "<s>": 1, "</s>": FIRST_ID - 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")), pad_token="<pad>", eos_token="</s>"
    )


def autocast_dtype(case: Case) -> torch.dtype | None:
    """The number format of matrix products, or None: that of the weights."""
    bf16, fp16 = uses_autocast(case.precision) if case.dtype != "float16" else (False, False)
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


def arguments(case: Case, folder: Path, optim: OptimConfig = OPTIM) -> TrainingArguments:
    """What the project's own trainer is told; the other trainers are told the same."""
    return training_arguments(
        folder,
        optim,
        TrainingConfig(
            max_steps=case.all_steps,
            micro_batch_rows=case.micro_batch_rows,
            accumulation_steps=case.accumulation_steps,
            precision=case.precision,
            seed=case.seed,
            log_every_steps=1,
            save_every_steps=None,
        ),
        EvaluationConfig(),
        TrackingConfig(),
        autocasts=case.dtype != "float16",
    )


def write_weights(case: Case, folder: Path) -> None:
    """Write the case's random weights and its tokenizer as a checkpoint."""
    _random_model(case, "sdpa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def build_model(case: Case, weights: Path, *, attention: str = "auto") -> PreTrainedModel | PeftModel:
    """The case's model on the device that trains it, with its adapter; `auto` is proved, as train.py does.

    Args:
        weights: checkpoint by `write_weights` that 4-bit weights are loaded from.
        attention: `model.attention`.
    Raises:
        UserError: the attention or the quantization is not to be had here, or lets documents of a pack see each other.
    """
    if case.method == "qlora":
        config = ModelConfig(path=str(weights), quantization="nf4", dtype=weights_dtype(case), attention=attention)
        model = load_model(config, load_settings(config, tokenizer()), tokenizer(), trains_all=False)
    else:
        model = _random_model(case, attention)
    device = torch.device(accelerator_name())
    if attention == "auto" and not prove_attention(
        model, attention, packing=True, device=device, autocast=autocast_dtype(case)
    ):
        raise UserError(f"model={case.model} does not keep the documents of a pack apart; give another shape")
    if case.gradient_checkpointing != "none":
        recompute_activations(model, case.gradient_checkpointing)
    torch.manual_seed(case.seed)  # of the adapter's weights
    return add_adapter(model, adapter_config(case))


def adapter_config(case: Case) -> AdapterConfig:
    """What trains beside the weights, if they are frozen."""
    return AdapterConfig() if case.method == "full" else AdapterConfig(kind="lora", rank=case.rank)


def weights_dtype(case: Case) -> str:
    """The format that weights are held in; those of a 4-bit model that are not quantized."""
    return case.dtype if case.dtype != "auto" else ("float32" if case.method == "full" else "bfloat16")


def _random_model(case: Case, attention: str) -> PreTrainedModel:
    config = ModelConfig(architecture=SHAPES[case.model], dtype=weights_dtype(case), attention=attention)
    words = tokenizer()
    torch.manual_seed(case.seed)
    with torch.device(accelerator_name()):
        return load_model(config, load_settings(config, words), words, trains_all=case.method == "full")
