"""A finished run's directory, as training leaves it, with a tiny real model: for tests of what comes after training.

run = write_run(tmp_path / "outputs" / "tiny", adapter=True)
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SourceConfig,
)

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
HOME = "/home/alice"
"""The home folder of whoever trained the runs that are written here."""


def tiny_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )


def write_model(folder: Path, *, chat_template: str | None = TEMPLATE) -> None:
    """A Llama of 17,112 weights and its tokenizer, as `save_pretrained` writes them."""
    tokenizer = tiny_tokenizer(chat_template)
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_run(
    directory: Path,
    *,
    base: str | None = None,
    base_folder: Path | None = None,
    chat_template: str | None = TEMPLATE,
    hub: HubConfig | None = None,
    record: dict[str, Any] | None = None,
) -> Path:
    """A run of the name of `directory`, in the folder beside it.

    Args:
        base: `model.path` of the run's config; None: random weights.
        base_folder: a model's folder; an adapter for it is written in place of a model, made for `base`.
        record: entries that replace those of result.json.
    """
    if base_folder is not None:
        _write_adapter(directory / "model", base_folder, base, chat_template)
    else:
        write_model(directory / "model", chat_template=chat_template)
    architecture = {"model_type": "llama", "hidden_size": 24} if base is None else {}
    data = f"{HOME}/secret client/train.jsonl"
    config = RunConfig(
        model=ModelConfig(path=base, architecture=architecture),
        adapter=AdapterConfig(kind="lora" if base_folder else "none"),
        data=DataConfig(
            train=(SourceConfig(path=data), SourceConfig(path="me/questions")),
            eval=(SourceConfig(path=f"{HOME}/held_out.jsonl"),),
            max_length=512,
        ),
        evaluation=EvaluationConfig(exact_match=True),
        hub=hub or HubConfig(),
        output=OutputConfig(folder=directory.parent.name, name=directory.name),
    )
    digest = hashlib.sha256(b"rows").hexdigest()
    local = {"path": data, "format": "messages", "sha256": {data: digest}, "revision": None, "rows": 90}
    on_hub = {"path": "me/questions", "format": "alpaca", "sha256": {}, "revision": "ab" * 20, "rows": 30}
    counts = {"rows_kept": 118, "tokens": 9000, "supervised_tokens": 4000, "dropped": {"too long": 2}}
    result = {
        "steps": 40,
        "tokens": 36000,
        "seconds": 12.5,
        "first_loss": 5.5,
        "last_loss": 0.25,
        "before": {"loss": 5.5625, "exact_match": 0.0, "answers": 16},
        "after": {"loss": 0.3125, "exact_match": 0.875, "answers": 16},
    }
    files = {
        "config.json": dataclasses.asdict(config),
        "environment.json": {
            "python": "3.11.7",
            "packages": {"torch": "2.13.0", "trl": None},
            "hardware": {"cores": 2, "gpus": ["Some GPU"]},
            "git_commit": "c0ffee" * 6 + "beef",
            "command": ["train.py", "--config", f"{HOME}/recipes/mine.py", "--optim.learning_rate", "2e-5"],
            "world_size": 2,
        },
        "data.json": {
            "train": {
                "sources": [{**local, "rows_kept": 88}, {**on_hub, "rows_kept": 30}],
                **counts,
            },
            "eval": {"sources": [{**local, "path": f"{HOME}/held_out.jsonl", "rows_kept": 16}], "rows_kept": 16},
        },
        "result.json": {**result, **(record or {})},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    lines = [{"step": 1, "loss": 5.5}, {"step": 40, "loss": 0.25, "checkpoint": f"{HOME}/tiny/checkpoint-40"}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def _write_adapter(folder: Path, base_folder: Path, base: str | None, chat_template: str | None) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
