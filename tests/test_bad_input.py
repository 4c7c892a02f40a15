"""A run that cannot be right does not start: one clear message, exit code 2, and nothing left behind."""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_run import (
    ARCHITECTURE,
    ROOT,
    chat_rows,
    conversation,
    from_checkpoint,
    run_train,
    stop_after,
    weights_of,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from tests.toy_tokenizer import toy_tokenizer


def refusal(folder: Path, *arguments: str, recipe: Path | None = None, **changes) -> str:
    """What a run that must not start says; it leaves no run directory, not even an empty one."""
    recipe = recipe or write_recipe(folder, **changes)
    done = run_train("--config", recipe, *arguments)
    assert done.code == 2, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("\nerror: " if "\nerror: " in done.stderr else "error: ") :].strip()
    assert "\nerror: " not in message
    assert len(message) < 1200, f"{len(message)} characters are more than one reads"
    left = [path.name for path in folder.glob("outputs/*") if path.name != ".data"]  # token rows are kept for the next
    assert not left, left
    return message


def train_on(path: Path, **fields) -> dict:
    return {"train": [{"path": str(path), **fields}]}


# Data


def test_a_data_file_that_is_missing_is_named_with_what_is_there(tmp_path):
    message = refusal(tmp_path, data=train_on(tmp_path / "trian.jsonl"))
    assert f"data.train.0.path='{tmp_path / 'trian.jsonl'}' does not exist" in message
    assert "its folder has train.jsonl" in message


def test_an_empty_data_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path, data=train_on(tmp_path / "empty.jsonl"))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "has no rows" in refusal(tmp_path, data=train_on(tmp_path / "blank.jsonl"))


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(conversation("a", "b")) + "\n\n{'messages': []}\n")
    assert f"{path} is not JSON at line 3" in refusal(tmp_path, data=train_on(path))


def test_columns_that_no_format_has_are_listed_with_what_was_expected(tmp_path):
    path = write_rows(tmp_path / "odd.jsonl", [{"frage": "a", "antwort": "b"}])
    message = refusal(tmp_path, data=train_on(path))
    for word in (str(path), "frage", "antwort", "messages", "prompt", "instruction", "columns"):
        assert word in message


def test_a_conversation_without_an_answer_is_named(tmp_path):
    rows = [*chat_rows(2), {"messages": [{"role": "user", "content": "hello?"}]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refusal(tmp_path, data=train_on(path))
    assert f"{path} line 3" in message
    assert "assistant" in message


def test_rows_that_are_all_masked_are_refused(tmp_path):
    rows = [conversation("long question " * 40, "yes") for _ in range(3)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refusal(tmp_path, data={**train_on(path), "too_long": "truncate"})
    assert "no train row is left: {'nothing supervised after truncation': 3}" in message
    assert "data.max_length=128" in message
    message = refusal(tmp_path, data={**train_on(path), "too_long": "drop"})
    assert "no train row is left: {'too long': 3}" in message


def test_rows_longer_than_the_context_are_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", max_position_embeddings=64)
    message = refusal(tmp_path, model=from_checkpoint(checkpoint), data={"max_length": 128})
    assert "data.max_length=128 exceeds the model's context of 64 tokens" in message
    assert "64 or less" in message
    message = refusal(tmp_path, model={"architecture": ARCHITECTURE | {"max_position_embeddings": 100}})
    assert "data.max_length=128 exceeds model.architecture.max_position_embeddings=100" in message


# The model and its tokenizer


def test_a_pattern_that_matches_no_module_is_answered_with_names_that_exist(tmp_path):
    model = from_checkpoint(write_checkpoint(tmp_path / "base"))
    message = refusal(tmp_path, model=model, adapter={"kind": "lora", "target_modules": ["q_proj", "query"]})
    assert "adapter.target_modules has 'query', which matches no module of LlamaForCausalLM" in message
    for name in ("q_proj", "v_proj", "gate_proj", "lm_head"):
        assert name in message
    message = refusal(tmp_path, model=model, adapter={"kind": "lora", "modules_to_save": ["embeddings"]})
    assert "adapter.modules_to_save has 'embeddings'" in message
    assert "embed_tokens" in message


def test_a_missing_weight_file_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", shard_size="60KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert f"model.path={checkpoint} is incomplete: 1 of {len(shards)} weight files" in message
    assert shards[1].name in message


def test_a_missing_tensor_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert f"the checkpoint {checkpoint} is incomplete: 1 weights are missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_tensor_of_another_shape_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert "model.norm.weight" in message
    assert str(checkpoint) in message


@pytest.mark.parametrize("kept", [0, 4, 1000, 100_000])
def test_a_weight_file_that_is_cut_short_is_named(tmp_path, kept):
    checkpoint = write_checkpoint(tmp_path / "base")
    content = (checkpoint / "model.safetensors").read_bytes()
    assert len(content) > 100_000
    (checkpoint / "model.safetensors").write_bytes(content[:kept])
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert str(checkpoint) in message
    assert "model.safetensors" in message


def test_a_checkpoint_without_weights_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base")
    (checkpoint / "model.safetensors").unlink()
    assert str(checkpoint) in refusal(tmp_path, model=from_checkpoint(checkpoint))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_checkpoint_without_one_of_its_settings_is_named(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "base")
    (checkpoint / name).unlink()
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert f"model.path={checkpoint} has no {name}" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_settings_that_are_not_json_are_named(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "base")
    (checkpoint / name).write_text('{"model_type": "lla')
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert str(checkpoint) in message
    assert name in message


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "none"}}'])
def test_a_tokenizer_file_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    assert f"model.tokenizer={path} is no tokenizer.json" in refusal(tmp_path, model={"tokenizer": str(path)})


def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path):
    message = refusal(tmp_path, model=from_checkpoint(tmp_path / "nothing"))
    assert f"model.path={tmp_path / 'nothing'} does not exist" in message


def test_an_adapter_is_no_checkpoint_to_start_from(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (folder / "tokenizer_config.json").write_text("{}")
    message = refusal(tmp_path, model=from_checkpoint(folder))
    assert "holds an adapter, not a model" in message
    assert "some/base" in message


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    tokenizer = toy_tokenizer()
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=tokenizer, vocabulary=len(tokenizer) - 3)
    message = refusal(tmp_path, model=from_checkpoint(checkpoint))
    assert f"has embeddings for {len(tokenizer) - 3} tokens" in message
    assert f"gives ids up to {len(tokenizer) - 1}" in message
    message = refusal(tmp_path, model={"architecture": ARCHITECTURE | {"vocab_size": 100}})
    assert "model.architecture.vocab_size=100 is below the" in message


def test_a_missing_tokenizer_or_template_is_named(tmp_path):
    missing = tmp_path / "no.json"
    assert f"model.tokenizer={missing} does not exist" in refusal(tmp_path, model={"tokenizer": str(missing)})
    missing = tmp_path / "no.jinja"
    assert f"model.chat_template={missing} does not exist" in refusal(tmp_path, model={"chat_template": str(missing)})
    assert "chat template" in refusal(tmp_path, model={"chat_template": None})


def test_a_template_that_is_no_jinja_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    message = refusal(tmp_path, recipe=recipe)
    assert "the chat template is no Jinja: line 1: Unexpected end of template" in message


def test_a_role_that_no_special_token_has_is_answered_with_the_nearest(tmp_path):
    message = refusal(tmp_path, model={"special_tokens": {"eos_tokn": "<|im_end|>"}})
    assert "model.special_tokens has no role 'eos_tokn'; did you mean eos_token?" in message


def test_settings_that_an_architecture_does_not_know_are_named(tmp_path):
    message = refusal(tmp_path, model={"architecture": ARCHITECTURE | {"hiden_size": 64}})
    assert "hiden_size (did you mean hidden_size?)" in message
    message = refusal(tmp_path, model={"architecture": {"model_type": "lama"}})
    assert "model.architecture.model_type=lama is not one that transformers knows; did you mean llama" in message


def test_a_setting_of_the_wrong_type_is_refused(tmp_path):
    message = refusal(tmp_path, model={"architecture": ARCHITECTURE | {"num_hidden_layers": "two"}})
    assert "Field 'num_hidden_layers' expected int, got str (value: 'two')" in message
    message = refusal(tmp_path, model={"architecture": ARCHITECTURE | {"hidden_act": "gelou"}})
    assert "'gelou'" in message


def test_attention_that_is_not_installed_is_refused(tmp_path):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    message = refusal(tmp_path, model={"attention": "flash_attention_2", "dtype": "bfloat16"})
    assert "model.attention=flash_attention_2" in message


def test_attention_that_cannot_train_without_a_gpu_is_refused(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert "flex_attention has no backward pass on a CPU" in refusal(tmp_path, model={"attention": "flex_attention"})


# The machine


def test_a_tracker_that_is_not_installed_is_named_with_how_to_install_it(tmp_path):
    absent = next((name for name in ("wandb", "trackio", "tensorboard") if not importlib.util.find_spec(name)), None)
    if absent is None:
        pytest.skip("all trackers are installed")
    message = refusal(tmp_path, tracking={"report_to": [absent]})
    assert f"tracking.report_to names {absent}, which is not installed" in message
    assert f"pip install {absent}" in message


def test_fp16_without_a_gpu_is_refused(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert "training.precision=fp16 needs a CUDA GPU" in refusal(tmp_path, training={"precision": "fp16"})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    message = refusal(tmp_path, output={"folder": str(tmp_path / "file")})
    assert str(tmp_path / "file") in message


def test_the_command_line_prints_one_message_and_no_traceback(tmp_path):
    recipe = write_recipe(tmp_path, data=train_on(tmp_path / "no.jsonl"))
    done = subprocess.run(
        [sys.executable, "train.py", "--config", str(recipe)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stdout == ""


# A disk that fills up


@contextlib.contextmanager
def small_files(limit: int):
    """No file of more than `limit` bytes can be written: what a full disk does, for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes at `folder`; skips where this user may not mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: weights may be mapped still


def assert_loads(checkpoint: Path) -> None:
    saved = load_file(checkpoint / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_from_which_the_run_goes_on(tmp_path):
    recipe, run = write_recipe(tmp_path, training={"keep_checkpoints": 9}), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe, "--output.name", "whole").code == 0
    whole = tmp_path / "outputs" / "whole"
    room = int(1.5 * sum(path.stat().st_size for path in (whole / "checkpoint-2").iterdir()))
    with small_disk(run, room):
        refused = run_train("--config", recipe)
        assert refused.code == 2
        assert "error: disk_space: the run writes up to " in refused.stderr
        assert [path.name for path in run.iterdir()] == []
        done = run_train("--config", recipe, "--force", "disk_space")
        assert done.code == 2, done.stderr
        assert f"error: checkpoint {run / 'checkpoint-4'} could not be written" in done.stderr
        assert "The last complete checkpoint is checkpoint-2; free some space, then use --resume" in done.stderr
        assert {path.name for path in run.iterdir()} & {".checkpoint", "checkpoint-4", "model"} == set()
        assert_loads(run / "checkpoint-2")
        subprocess.run(["mount", "-o", f"remount,size={9 * room}", str(run)], check=True)
        done = run_train("--config", recipe, "--resume")
        assert done.code == 0, done.stderr
        weights, other = weights_of(run / "model"), weights_of(whole / "model")
        assert all(torch.equal(weights[name], other[name]) for name in other)


def test_a_file_that_cannot_be_written_leaves_the_run_to_go_on(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    expected = weights_of(run / "model")
    stop_after(run, 2)
    with small_files(100_000):  # below the size of the weights
        done = run_train("--config", recipe, "--resume")
    assert done.code == 2, done.stderr
    assert "The last complete checkpoint is checkpoint-2; free some space, then use --resume" in done.stderr
    assert_loads(run / "checkpoint-2")
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(run / "model").items())


def test_a_result_that_cannot_be_written_can_be_exported_again(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    expected = weights_of(run / "model")
    stop_after(run, 4)
    with small_files(100_000):
        done = run_train("--config", recipe, "--resume")
    assert done.code == 2, done.stderr
    assert f"error: {run / 'model'} could not be written" in done.stderr
    assert "free some space, then use --resume" in done.stderr
    assert not [path.name for path in run.iterdir() if path.name.startswith((".", "model"))]
    assert run_train("--config", recipe, "--resume").code == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(run / "model").items())
