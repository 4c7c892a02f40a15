"""Runs of several processes, started as their user starts them: `accelerate launch` without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny_run import (
    ROOT,
    chat_rows,
    from_checkpoint,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    weights_of,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from utils.distributed import check_world
from utils.errors import UserError


def launch_command(*arguments: str | Path) -> list[str]:
    """`accelerate launch` with two processes, as the README has it for a machine without a GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config/accelerate/ddp_cpu.yaml"]
    return [*command, "--main_process_port", "0", "train.py", *map(str, arguments)]


def launch(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        launch_command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **(environment or {})},
    )


@pytest.mark.parametrize("adapter", ["none", pytest.param("lora", marks=pytest.mark.slow)])
def test_two_launched_processes_end_with_the_weights_of_one(tmp_path, adapter):
    base = {"model": from_checkpoint(write_checkpoint(tmp_path / "base"))} if adapter == "lora" else {}
    recipe = write_recipe(
        tmp_path,
        **base,
        adapter={"kind": adapter},
        evaluation={"exact_match": True, "samples": 1},  # fewer questions than processes, then an odd number of them
        data={
            "eval": [{"path": str(write_rows(tmp_path / "three.jsonl", chat_rows()[:3]))}],
            "contract": {"leak": 1.0},
        },
        training={"micro_batch_rows": 2, "accumulation_steps": 2, "max_steps": 10, "save_every_steps": 4},
    )
    done = run_train("--config", recipe, "--output.name", "one")
    assert done.code == 0, done.stderr
    launched = launch("--config", recipe, "--output.name", "two", "--training.accumulation_steps", "1")
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stderr.count("2 process(es) on cpu") == 1
    one, two = tmp_path / "outputs" / "one", tmp_path / "outputs" / "two"
    weights, other = (
        {name: tensor for name, tensor in weights_of(run / "model").items() if adapter == "none" or "lora_" in name}
        for run in (one, two)
    )
    difference = sum(((weights[name] - other[name]).double() ** 2).sum() for name in weights) ** 0.5
    # float32 sums in another order: a rounding or two of 6e-8 a step, over ten steps.
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


def train_with(processes: int, *arguments: str | Path) -> str:
    """Train with two processes or one, on the same global batches, and return what was told."""
    if processes == 1:
        done = run_train(*arguments)
        assert done.code == 0, done.stderr[-3000:]
    else:
        done = launch(*arguments, "--training.accumulation_steps", "1")
        assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_of_two_processes_or_one_goes_on_with_two_or_one(tmp_path, first, second):
    recipe, run = two_epochs(tmp_path, "full" if first == second else "plain"), tmp_path / "outputs" / "run"
    train_with(first, "--config", recipe)
    whole = weights_of(run / "model")
    stop_after(run, 4)
    told = train_with(second, "--config", recipe, "--resume")
    weights = weights_of(run / "model")
    if first == second:
        assert all(torch.equal(weights[name], whole[name]) for name in whole)
    else:
        assert f"warning: world_size was {first} when this run started and is {second} now" in told
        for name in whole:
            torch.testing.assert_close(weights[name], whole[name], rtol=1e-4, atol=1e-6)


TIMEOUT_S = 5
"""Seconds after which a collective that not all processes have come to ends the run."""

LOCKS = Path("/proc/locks")
needs_locks = pytest.mark.skipif(not LOCKS.is_file(), reason="the system does not tell who holds a lock (/proc/locks)")


def long_recipe(folder: Path) -> Path:
    """A recipe whose rows take a second or more to prepare, and whose processes wait TIMEOUT_S for each other."""
    rows = [
        {"prompt": f"count to {number} {'on ' * (number % 20)}", "completion": f"one {number}"}
        for number in range(6000)
    ]
    plain = write_recipe(folder, data={"train": [{"path": str(write_rows(folder / "long.jsonl", rows))}]})
    recipe = folder / "recipe.py"
    recipe.write_text(
        "import datetime, os, pathlib, torch\n"
        "from config.loader import load_recipe\n"
        "if 'RANK' in os.environ:\n"
        f"    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds={TIMEOUT_S}))\n"
        f"config = load_recipe(pathlib.Path({str(plain)!r}))\n"
    )
    return recipe


def start(command: list[str], log: Path) -> subprocess.Popen:
    with open(log, "w") as errors:
        return subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)


def preparing(cache: Path, *children: subprocess.Popen) -> int:
    """The process that holds the lock of those who prepare data below `cache`, as soon as one does."""
    while all(child.poll() is None for child in children):
        inodes = {str(path.stat().st_ino) for path in cache.glob("*/lock")}
        for line in LOCKS.read_text().splitlines():
            _, kind, _, mode, pid, place, *_ = line.replace("-> ", "").split()
            if (kind, mode) == ("FLOCK", "WRITE") and place.split(":")[-1] in inodes:
                return int(pid)
        time.sleep(0.002)
    raise AssertionError("it ended before a process was seen to prepare")


@pytest.mark.slow
@needs_locks
def test_one_process_prepares_for_longer_than_a_collective_may_take(tmp_path):
    recipe, cache = long_recipe(tmp_path), tmp_path / "outputs" / ".data"
    child = start(launch_command("--config", recipe), tmp_path / "log")
    pid = preparing(cache, child)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT_S)
    assert not list(cache.glob("*/complete.json")), "it was stopped too late to show anything"
    os.kill(pid, signal.SIGCONT)
    assert child.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert len(list(cache.glob("*/complete.json"))) == 1
    assert json.loads((tmp_path / "outputs" / "run" / "environment.json").read_text())["world_size"] == 2


@pytest.mark.slow
@needs_locks
def test_a_launched_run_ends_where_the_process_that_prepares_is_killed_and_the_next_goes_on(tmp_path):
    recipe, cache = long_recipe(tmp_path), tmp_path / "outputs" / ".data"
    child = start(launch_command("--config", recipe), tmp_path / "log")
    pid = preparing(cache, child)
    os.kill(pid, signal.SIGKILL)
    assert child.wait(120) != 0
    log = (tmp_path / "log").read_text()
    assert "SIGKILL" in log
    assert f"(pid: {pid})" in log
    assert not list(cache.glob("*/complete.json"))
    again = launch("--config", recipe)
    assert again.returncode == 0, again.stderr[-3000:]


@pytest.mark.slow
@needs_locks
def test_a_run_goes_on_where_another_that_prepared_the_same_rows_is_killed(tmp_path):
    recipe, cache = long_recipe(tmp_path), tmp_path / "outputs" / ".data"
    runs = [
        start([sys.executable, "train.py", "--config", str(recipe), "--output.name", name], tmp_path / name)
        for name in ("one", "two")
    ]
    pid = preparing(cache, *runs)
    killed = next(run for run in runs if run.pid == pid)
    other = next(run for run in runs if run.pid != pid)
    os.kill(pid, signal.SIGSTOP)  # so that the other is sure to wait for it
    log = tmp_path / ("two" if killed is runs[0] else "one")
    while "another process prepares the data" not in log.read_text() and other.poll() is None:
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert other.wait(300) == 0, log.read_text()[-3000:]


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
