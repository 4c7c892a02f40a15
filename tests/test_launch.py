"""Runs of several processes, started as their user starts them: `accelerate launch` without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_run import (
    ROOT,
    chat_rows,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    weights_of,
    write_recipe,
    write_rows,
)
from utils.distributed import check_world
from utils.errors import UserError


def launch(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes, as the README has it for a machine without a GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config/accelerate/ddp_cpu.yaml"]
    command += ["--main_process_port", "0", "train.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, errors="replace", env={**os.environ, **(environment or {})}
    )


def test_two_launched_processes_end_with_the_weights_of_one(tmp_path):
    recipe = write_recipe(
        tmp_path,
        evaluation={"exact_match": True, "samples": 1},  # fewer questions than processes, then an odd number of them
        data={
            "eval": [{"path": str(write_rows(tmp_path / "three.jsonl", chat_rows()[:3]))}],
            "contract": {"leak": 1.0},
        },
        training={"micro_batch_rows": 2, "accumulation_steps": 2, "max_steps": 5, "save_every_steps": 2},
    )
    done = run_train("--config", recipe, "--output.name", "one")
    assert done.code == 0, done.stderr
    launched = launch("--config", recipe, "--output.name", "two", "--training.accumulation_steps", "1")
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stderr.count("2 process(es) on cpu") == 1
    one, two = tmp_path / "outputs" / "one", tmp_path / "outputs" / "two"
    weights, other = weights_of(one / "model"), weights_of(two / "model")
    difference = sum(((weights[name] - other[name]).double() ** 2).sum() for name in weights) ** 0.5
    # float32 sums in another order: a rounding or two of 6e-8 a step, over five steps.
    assert difference / sum((tensor.double() ** 2).sum() for tensor in weights.values()) ** 0.5 <= 1e-6
    for line, other_line in zip(metrics_of(one), metrics_of(two), strict=True):
        names = {"step", "loss", "eval_loss", "eval_exact_match", "eval_answers", "tokens"} & line.keys()
        assert {name: line[name] for name in names} == pytest.approx({name: other_line[name] for name in names})
    samples = [(one / "samples.jsonl").read_text(), (two / "samples.jsonl").read_text()]
    assert samples[0] == samples[1]
    assert json.loads((two / "environment.json").read_text())["world_size"] == 2
    assert len(list(two.glob("checkpoint-*"))) == 2


def test_a_launched_run_says_first_what_is_wrong_with_its_recipe(tmp_path):
    done = launch("--config", write_recipe(tmp_path), "--optim.learning_rat", "1e-3")
    assert done.returncode != 0
    first = next(line for line in done.stderr.splitlines() if line.strip())
    assert first.startswith("error: ")
    assert "learning_rat" in first
    assert 'train.py", line' not in done.stderr  # the launcher may show its own frames, but none of ours
    assert done.stderr.count("error: ") == 1


@pytest.mark.slow
def test_what_only_another_process_meets_is_said_too(tmp_path):
    # As where a file is missing on the second of two machines.
    plain = write_recipe(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import dataclasses, os, pathlib\n"
        "from config.loader import load_recipe\n"
        f"config = load_recipe(pathlib.Path({str(plain)!r}))\n"
        "if os.environ['RANK'] == '1':\n"
        "    data = dataclasses.replace(config.data, train=(dataclasses.replace(config.data.train[0],\n"
        "                                                                       path='missing.jsonl'),))\n"
        "    config = dataclasses.replace(config, data=data)\n"
    )
    done = launch("--config", recipe)
    assert done.returncode != 0
    assert "error: data.train.0.path='missing.jsonl' does not exist" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_a_run_of_two_processes_goes_on_with_two_or_one(tmp_path, processes):
    recipe, run = two_epochs(tmp_path, "full" if processes == 2 else "plain"), tmp_path / "outputs" / "run"
    two = ("--training.accumulation_steps", "1")
    first = launch("--config", recipe, *two)
    assert first.returncode == 0, first.stderr[-3000:]
    whole = weights_of(run / "model")
    stop_after(run, 4)
    second = (
        launch("--config", recipe, "--resume", *two) if processes == 2 else run_train("--config", recipe, "--resume")
    )
    assert (second.returncode if processes == 2 else second.code) == 0, second.stderr[-3000:]
    weights = weights_of(run / "model")
    if processes == 2:
        assert all(torch.equal(weights[name], whole[name]) for name in whole)
    else:
        assert "warning: world_size was 2 when this run started and is 1 now" in second.stderr
        for name in whole:
            torch.testing.assert_close(weights[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_world_without_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # a leftover of a batch system, say
    monkeypatch.setenv("RANK", "0")
    done = run_train("--config", write_recipe(tmp_path))
    assert done.code == 2
    assert "WORLD_SIZE=2 is set" in done.stderr
    assert "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in done.stderr
    assert "accelerate launch --config_file config/accelerate/ddp.yaml" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_processes_that_believe_they_are_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"started 2 processes \(WORLD_SIZE\), but each believes in 1"):
        check_world(processes=1)
    check_world(processes=2)
