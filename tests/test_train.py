"""train.py as its user runs it: what a run leaves behind, and what resuming must not change."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_run import (
    ROOT,
    assert_same_run,
    chat_rows,
    from_checkpoint,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    weights_of,
    write_recipe,
    write_rows,
)
from tests.toy_tokenizer import CHATML

RECORD = (
    "config.json",
    "environment.json",
    "data.json",
    "plan.json",
    "inputs.json",
    "metrics.jsonl",
    "samples.jsonl",
    "result.json",
    "README.md",
)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """The directory of a run of four steps from random weights, with exact match."""
    folder = tmp_path_factory.mktemp("full")
    done = run_train("--config", write_recipe(folder, evaluation={"exact_match": True}))
    assert done.code == 0, done.stderr
    return folder / "outputs" / "run"


def test_a_run_directory_holds_its_whole_record(full_run):
    names = {path.name for path in full_run.iterdir()}
    assert names == {*RECORD, "checkpoint-2", "checkpoint-4", "model"}
    config = json.loads((full_run / "config.json").read_text())
    assert config["training"]["max_steps"] == 4
    assert config["model"]["architecture"]["hidden_size"] == 32
    assert json.loads((full_run / "environment.json").read_text())["packages"]["torch"]
    data = json.loads((full_run / "data.json").read_text())
    assert data["train"]["rows_kept"] == 20
    assert data["eval"]["rows_kept"] == 4
    result = json.loads((full_run / "result.json").read_text())
    assert (result["skipped_steps"], result["best"]) == (0, None)
    metrics = metrics_of(full_run)
    assert result["steps"] == 4
    assert result["parameters"]["total"] == sum(tensor.numel() for tensor in weights_of(full_run / "model").values())
    assert result["after"]["loss"] == [line["eval_loss"] for line in metrics if "eval_loss" in line][-1]
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["after"]["answers"] == 4
    samples = [json.loads(line) for line in (full_run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (0, "please count to 0 from 0"),
        (4, "please count to 0 from 0"),
    ]


def test_metrics_have_a_line_a_step_with_finite_figures(full_run):
    lines = [line for line in metrics_of(full_run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > line["supervised_tokens_per_second"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_last_step_has_a_line_whatever_the_interval(tmp_path):
    done = run_train("--config", write_recipe(tmp_path, training={"log_every_steps": 3}))
    assert done.code == 0, done.stderr
    lines = [line for line in metrics_of(tmp_path / "outputs" / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert json.loads((tmp_path / "outputs" / "run" / "result.json").read_text())["last_loss"] == lines[-1]["loss"]


def test_the_result_loads_with_its_chat_template(full_run):
    model = AutoModelForCausalLM.from_pretrained(full_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(full_run / "model")
    saved = weights_of(full_run / "model")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    stop = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id in (stop, [stop])  # an older Trainer makes a list of one id
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]


def test_generate_answers_from_the_result(full_run):
    command = [sys.executable, "scripts/generate.py", str(full_run / "model"), "--prompt", "count to 1 from 0"]
    done = subprocess.run(
        [*command, "--max_new_tokens", "4"], cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_adapter_loads_beside_the_model_it_was_trained_from(full_run, tmp_path):
    recipe = write_recipe(tmp_path, model=from_checkpoint(full_run / "model"), adapter={"kind": "lora", "rank": 2})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    folder = tmp_path / "outputs" / "run" / "model"
    assert not (folder / "model.safetensors").exists()
    peft_model = AutoPeftModelForCausalLM.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(full_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    ids = tokenizer("count to 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tuned = peft_model(ids).logits
        assert torch.equal(plain(ids).logits, tuned)
        assert not torch.allclose(base(ids).logits, tuned, atol=1e-4)
    learned = weights_of(folder)
    assert all(tensor.abs().max() > 0 for name, tensor in learned.items() if "lora_B" in name)


def test_a_run_without_evaluation_rows_ends_well(tmp_path):
    done = run_train("--config", write_recipe(tmp_path, data={"eval": None}, training={"max_steps": 1}))
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "run" / "result.json").read_text())["after"] == {}


def test_new_weights_depend_on_the_seed_alone(tmp_path):
    # With a rate this small the result holds the weights that the run began with.
    recipe = write_recipe(
        tmp_path,
        data={"eval": None},
        optim={"learning_rate": 1e-30},
        training={"max_steps": 1, "save_every_steps": None},
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # what ran before in this process must not matter
        done = run_train("--config", recipe, "--training.seed", str(seed), "--output.name", name)
        assert done.code == 0, done.stderr
    first, same, other = (weights_of(tmp_path / "outputs" / name / "model") for name in "abc")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


# --resume


@pytest.mark.parametrize(
    ("kind", "optim"),
    [
        ("full", {}),
        ("lora", {}),
        ("full", {"name": "muon", "weight_decay": 0.1, "schedule": "warmup_stable_decay", "decay_fraction": 0.5}),
        pytest.param("lora", {"lora_plus_ratio": 16.0, "min_lr_fraction": 0.1}, marks=pytest.mark.slow),
        pytest.param("lora", {"name": "muon", "lora_plus_ratio": 4.0}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "muon", "lora_plus", "muon_lora_plus"],
)
def test_a_resumed_run_ends_as_one_never_stopped(tmp_path, kind, optim):
    optim = {"learning_rate": 3e-3, **optim}
    recipe, run, whole = two_epochs(tmp_path, kind, optim=optim), tmp_path / "outputs" / "run", tmp_path / "whole"
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert [line["epoch"] for line in metrics_of(run) if "loss" in line][-1] == 2.0
    shutil.copytree(run, whole)
    for step in (4, 2, 6):
        stop_after(run, step)
        done = run_train("--config", recipe, "--resume")
        assert done.code == 0, done.stderr
        assert f"step {step}/6  loss" not in done.stderr
        assert step == 6 or f"step {step + 1}/6  loss" in done.stderr
        assert_same_run(run, whole)
    # The comparison sees dropout that draws other numbers after a resume.
    stop_after(run, 4)
    (run / "checkpoint-4" / "rng_state.pth").unlink()
    (run / "checkpoint-4" / "checkpoint.json").unlink()  # else the checkpoint is not taken
    assert run_train("--config", recipe, "--resume").code == 0
    weights, others = weights_of(run / "model"), weights_of(whole / "model")
    assert any(not torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_goes_on_as_if_it_was_not(tmp_path):
    recipe = two_epochs(tmp_path, "full", training={"epochs": 6.0, "save_every_steps": 4, "keep_checkpoints": 2})
    run = tmp_path / "outputs" / "run"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "train.py", "--config", str(recipe)], cwd=ROOT, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not (run / "checkpoint-4").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (run / "model").exists()
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert len(list(run.glob("checkpoint-*"))) == 2
    done = run_train("--config", recipe, "--output.name", "whole")
    assert done.code == 0, done.stderr
    assert_same_run(run, tmp_path / "outputs" / "whole")


def test_a_half_written_checkpoint_is_ignored_and_leaves_nothing(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    stop_after(run, 2)
    half = run / ".checkpoint" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "left_over.bin").write_bytes(b"half")
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert "step 3/4" in done.stderr
    assert {path.name for path in run.iterdir()} == {*RECORD, "checkpoint-2", "checkpoint-4", "model"}
    assert not (run / "checkpoint-4" / "left_over.bin").exists()
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoint-4")


def test_a_run_that_goes_on_from_its_last_step_takes_no_other(tmp_path):
    # Four of an epoch's five steps: Trainer would take the fifth.
    recipe, run = write_recipe(tmp_path, optim={"schedule": "constant"}), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    shutil.copytree(run, tmp_path / "whole")
    stop_after(run, 4)
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert "step 5/4" not in done.stderr
    assert_same_run(run, tmp_path / "whole")


def test_starting_over_a_run_is_refused_with_both_ways_out(full_run):
    before = sorted((path, path.stat().st_mtime_ns) for path in full_run.rglob("*"))
    done = run_train("--config", full_run.parents[1] / "recipe.yaml")
    assert done.code == 2
    assert f"{full_run} holds a run already" in done.stderr
    assert "--resume" in done.stderr
    assert "--output.name" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in full_run.rglob("*")) == before


def test_starting_over_a_run_without_a_checkpoint_does_not_send_to_resume(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")  # as of one that was killed before its first checkpoint
    done = run_train("--config", recipe)
    assert done.code == 2
    assert f"{run} holds a run already; it has no checkpoint: remove {run}, or start another" in done.stderr


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    done = run_train("--config", write_recipe(tmp_path), "--resume")
    assert done.code == 2
    assert f"--resume found no complete checkpoint in {tmp_path / 'outputs' / 'run'}" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_resuming_names_each_changed_setting(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    stop_after(run, 2)
    done = run_train("--config", recipe, "--resume", "--optim.learning_rate", "1e-3", "--evaluation.samples", "2")
    assert done.code == 0, done.stderr
    assert "warning: optim.learning_rate was 0.003 when this run started and is 0.001 now" in done.stderr
    assert "warning: evaluation.samples was 1 when this run started and is 2 now" in done.stderr
    assert done.stderr.count("when this run started") == 2


def test_resuming_on_other_data_or_other_processes_is_told(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    stop_after(run, 2)
    rows = chat_rows()
    answer = rows[2]["messages"][1]  # of which one word is another, so that the row keeps its length
    answer["content"] = answer["content"].replace("zero", "nine", 1)
    write_rows(tmp_path / "train.jsonl", rows)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"world_size": 4}))
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert f"warning: train.sources.0.sha256.{tmp_path / 'train.jsonl'} was" in done.stderr
    assert "warning: world_size was 4 when this run started and is 1 now" in done.stderr
    assert done.stderr.count("when this run started") == 2
