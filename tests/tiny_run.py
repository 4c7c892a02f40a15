"""A recipe that trains a tiny model in a second, and `train.py` run on it as its user runs it, within this process.

recipe = write_recipe(tmp_path, training={"max_steps": 4})
done = run_train("--config", recipe)
assert done.code == 0, done.stderr
"""

import contextlib
import io
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import train
from tests.toy_tokenizer import CHATML, toy_tokenizer

ROOT = Path(__file__).resolve().parent.parent

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def conversation(question: str, answer: str) -> dict[str, Any]:
    """A row of chat data."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chat_rows(count: int = 20) -> list[dict[str, Any]]:
    """Questions whose answers differ in length, so that no two micro-batches have the same number of tokens."""
    return [
        conversation(f"count to {number} from {index}", " ".join(NUMBERS[: 1 + (number * 7 + index) % 12]))
        for index in range(2)
        for number in range(count // 2)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    """A recipe with its tokenizer, chat template and data in `folder`; the run goes to `folder`/outputs/run.

    Args:
        changes: sections, whose fields replace those of the tiny run; a field of None is left out.
    """
    folder.mkdir(exist_ok=True)
    toy_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "template.jinja").write_text(CHATML, encoding="utf-8")
    train_file = write_rows(folder / "train.jsonl", chat_rows())
    questions = [conversation(f"please {row['messages'][0]['content']}", "zero") for row in chat_rows(4)]
    eval_file = write_rows(folder / "eval.jsonl", questions)
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "architecture": ARCHITECTURE,
            "tokenizer": str(folder / "tokenizer.json"),
            "chat_template": str(folder / "template.jinja"),
            "special_tokens": {"eos_token": "<|im_end|>"},
        },
        "data": {"train": [{"path": str(train_file)}], "eval": [{"path": str(eval_file)}], "max_length": 128},
        "optim": {"learning_rate": 3e-3},
        "training": {
            "cpu_threads": 1,
            "max_steps": 4,
            "micro_batch_rows": 2,
            "log_every_steps": 1,
            "save_every_steps": 2,
        },
        "evaluation": {"samples": 1, "max_new_tokens": 4},
        "output": {"folder": str(folder / "outputs")},
    }
    for section, fields in changes.items():
        merged = tree.get(section, {}) | fields
        tree[section] = {field: value for field, value in merged.items() if value is not None}
    path = folder / name
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def from_checkpoint(checkpoint: Path, **more: Any) -> dict[str, Any]:
    """A recipe's `model` section that starts from a checkpoint with its own tokenizer."""
    own = {"architecture": None, "tokenizer": None, "chat_template": None, "special_tokens": None}
    return own | {"path": str(checkpoint)} | more


def write_checkpoint(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: int | None = None,
    shard_size: str = "5GB",
    **settings: Any,
) -> Path:
    """A tiny Llama with random weights and its tokenizer, as `save_pretrained` writes them.

    Args:
        tokenizer: the toy tokenizer with a chat template, if None.
        vocabulary: rows of the embeddings; as many as the tokenizer has ids, if None.
        settings: of the config, in place of the tiny ones.
    """
    tokenizer = tokenizer or toy_tokenizer()
    torch.manual_seed(0)
    shape = {key: value for key, value in ARCHITECTURE.items() if key != "model_type"} | settings
    config = LlamaConfig(vocab_size=vocabulary or len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def run_train(*arguments: str | Path) -> Finished:
    """What `python train.py ARGUMENTS` prints and exits with."""
    logging.getLogger("smolfactory").handlers.clear()  # so that the log goes to the stream of this call
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["train.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = train.main()
    return Finished(code, out.getvalue(), err.getvalue())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that two equal runs share: all but those that depend on the clock."""
    timed = ("per_second", "runtime", "mfu")
    return [{key: value for key, value in line.items() if not key.endswith(timed)} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model or an adapter, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def stop_after(run: Path, step: int) -> None:
    """Take from a run's directory what it would not have, had it been killed soon after a checkpoint."""
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "model")
    for name in ("result.json", "README.md"):
        (run / name).unlink()


def two_epochs(folder: Path, kind: str, **sections: Any) -> Path:
    """A recipe of two epochs of three steps, with a checkpoint within each, and with dropout unless `kind` is plain."""
    training = {
        "max_steps": None,
        "epochs": 2.0,
        "micro_batch_rows": 2,
        "accumulation_steps": 2,
        "keep_checkpoints": 9,
        **sections.pop("training", {}),
    }
    if kind in ("full", "plain"):
        changes = {"model": {"architecture": ARCHITECTURE | {"attention_dropout": 0.1 if kind == "full" else 0.0}}}
    else:
        changes = {
            "model": from_checkpoint(write_checkpoint(folder / "base")),
            "adapter": {"kind": "lora", "rank": 2, "dropout": 0.1},
        }
    return write_recipe(
        folder, training=training, evaluation={"every_steps": 4, "exact_match": True}, **changes, **sections
    )


def assert_same_run(run: Path, other: Path) -> None:
    """Both directories hold the same weights, bit for bit, and the same metrics and samples."""
    weights, other_weights = weights_of(run / "model"), weights_of(other / "model")
    assert weights.keys() == other_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], other_weights[name])] == []

    def lines(folder):
        # The training's own summary, of train_runtime, is of the steps since the resume.
        return [line for line in without_timings(metrics_of(folder)) if "train_loss" not in line]

    pairs = zip_longest(lines(run), lines(other))
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert (run / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
