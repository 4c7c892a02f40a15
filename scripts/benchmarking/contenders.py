"""The trainers that are compared, each as its user builds it, on the same weights, rows and optimizer settings.

- `floor`: a plain loop; see scripts/benchmarking/floor.py.
- `smolfactory`: this project's trainer with the attention that it chooses, as train.py builds it.
- `trl packed`: TRL's SFTTrainer on packs. TRL would pack by itself; it is given the same packs as the others.
- `trl padded`: TRL's SFTTrainer without packing.
- `trainer`: transformers' Trainer with padding.
- `trl liger`: `trl packed` with Liger's kernels, where they are installed and there is a CUDA GPU.
- `unsloth`: `trl packed` on the model as Unsloth loads it, where that is installed and there is a CUDA GPU.
- those of scripts/benchmarking/variants.py: `smolfactory` with one thing taken away; they run where they are asked for.

Labels are given to all. That TRL's masks (assistant_only_loss, a template with `{% generation %}` marks) are the same
is what the record of instruction rows says of them.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer
from transformers.training_args import TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from scripts.benchmarking.case import Case
from scripts.benchmarking.layout import Layout
from scripts.benchmarking.models import adapter_config, arguments, build_model, tokenizer
from scripts.benchmarking.variants import VARIANTS
from src.activations import recompute_activations
from src.compilation import CompiledLayers
from src.packing import IGNORED
from src.trainer import SFTTrainer
from utils.errors import UserError

SHARED_ARGUMENTS = (
    "output_dir",
    "report_to",
    "use_cpu",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "save_strategy",
    "disable_tqdm",
)
"""Settings of the project's own trainer that the others are given too."""


def installed_contenders() -> list[str]:
    """The contenders that can run here."""
    cuda = torch.cuda.is_available()
    more = {"trl liger": "liger_kernel", "unsloth": "unsloth"}
    found = [name for name, package in more.items() if cuda and importlib.util.find_spec(package)]
    return ["floor", "smolfactory", "trl packed", "trl padded", "trainer", *found]


def checked_contenders(asked: Sequence[str] | None) -> list[str]:
    """Those that are asked for, or where none are, all that run without being asked for.

    Raises:
        UserError: one is none, or cannot run here.
    """
    installed = installed_contenders()
    known = list(dict.fromkeys([*installed, *VARIANTS]))
    if unknown := sorted(set(asked or ()) - set(known)):
        raise UserError(f"--contenders {', '.join(unknown)}: not to be had here; give some of {', '.join(known)}")
    return list(asked or installed)


def takes_packs(name: str) -> bool:
    """Whether a contender trains on packs, and not on padded rows."""
    return name not in ("trl padded", "trainer")


def packed_attentions() -> list[str]:
    """What may be the best attention for TRL's packs on this device; of several, only a trial tells which is."""
    if not torch.cuda.is_available():
        return ["sdpa"]
    flash = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    return [name for name, installed in flash.items() if installed][:1] or ["sdpa", "flex_attention"]


def needs_checkpoint(name: str, case: Case) -> bool:
    """Whether a contender loads the weights from a checkpoint, and does not make them."""
    return case.method == "qlora" or name == "unsloth"


def build_trainer(name: str, layout: Layout, folder: Path, *, weights: Path, attention: str) -> Trainer:
    """A contender's trainer with the rows of a case; every one but `floor` has one.

    Args:
        weights: checkpoint for those who need one.
        attention: what TRL's packs are trained with.
    Raises:
        UserError: the machine cannot run it.
    """
    case, words = layout.case, tokenizer()
    if variant := VARIANTS.get(name):
        args = arguments(case, folder, variant.optim)
        model = build_model(case, weights, attention=variant.attention)
        if variant.recomputes and case.gradient_checkpointing == "none":
            recompute_activations(model, "full")
        own = {"train_packs": layout.packs, "optim": variant.optim, "score": variant.score()}
        trainer = SFTTrainer(model=model, args=args, tokenizer=words, **own)
        trainer.add_callback(CompiledLayers(case.compile, trainer.score, trainer.data_collator))
        return trainer
    if name == "trainer":
        model = build_model(case, weights, attention="sdpa")
        args = TrainingArguments(**_given(layout, folder, packed=False))
        padding = DataCollatorForSeq2Seq(words, label_pad_token_id=IGNORED)
        rows = layout.rows_table()
        return Trainer(model=model, args=args, data_collator=padding, train_dataset=rows, processing_class=words)
    if name == "unsloth":
        model = _unsloth_model(case, weights)
    else:
        model = build_model(case, weights, attention=attention if takes_packs(name) else "sdpa")
    return _trl_trainer(model, layout, folder, packed=takes_packs(name), liger=name == "trl liger")


def _given(layout: Layout, folder: Path, *, packed: bool) -> dict[str, Any]:
    """Arguments of a trainer: those of this project's, and batches of packs or of about as many tokens in rows."""
    own = arguments(layout.case, folder)
    rows = own.per_device_train_batch_size if packed else layout.padded_rows
    accumulation = own.gradient_accumulation_steps if packed else layout.padded_accumulation_steps
    return {name: getattr(own, name) for name in SHARED_ARGUMENTS} | {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
    }


def _trl_trainer(model: PreTrainedModel, layout: Layout, folder: Path, *, packed: bool, liger: bool) -> Trainer:
    """TRL's trainer. Where `build_model` has switched recomputation on, it stays on."""
    import trl

    args = trl.SFTConfig(
        **_given(layout, folder, packed=packed),
        max_length=layout.case.max_length,
        packing=packed,
        dataset_kwargs={"skip_prepare_dataset": packed},  # else TRL would make other packs
        gradient_checkpointing=False,
        use_liger_kernel=liger,
    )
    rows = layout.packs_table() if packed else layout.rows_table()
    return trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer())


def _unsloth_model(case: Case, weights: Path) -> PreTrainedModel:
    """The same weights as Unsloth loads them; its adapter starts from weights of its own."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(weights),
        max_seq_length=case.max_length,
        dtype=None if case.dtype == "auto" else getattr(torch, case.dtype),
        load_in_4bit=case.method == "qlora",
        full_finetuning=case.method == "full",
    )
    if case.method == "full":
        return model
    config = adapter_config(case)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
        use_gradient_checkpointing="unsloth" if case.gradient_checkpointing != "none" else False,
        random_state=case.seed,
    )
