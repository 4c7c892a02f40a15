"""Faults of disk, clock and processes: each is named, and leaves the last good state, from which the run goes on.

The disk is a small file system that is really full, or really read-only; both need root.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from unittest import mock

import psutil
import pytest
import torch

import src.callbacks
import src.eviction
import src.run
from src.cache import IN_USE, prepared
from src.eviction import GIB, keep_within
from tests.test_bad_input import assert_loads, small_disk
from tests.test_launch import launch, launch_command, start
from tests.tiny_run import (
    assert_same_run,
    chat_rows,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    weights_of,
    write_recipe,
    write_rows,
)
from utils.checkpointing import CheckpointWriter, checkpoints

MIB = 2**20
PAGE = 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a recipe of six steps, with a run that met no fault in `whole` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_train("--config", two_epochs(folder, "full"))
    assert done.code == 0, done.stderr
    shutil.move(folder / "outputs" / "run", folder / "whole")
    return folder


@pytest.fixture
def run(whole):
    """Where that recipe's runs go, which is not there yet."""
    yield whole / "outputs" / "run"
    shutil.rmtree(whole / "outputs" / "run", ignore_errors=True)


def fill(folder, lines):
    """Take all room on the disk of a folder, the rest of the last page of a file of lines included."""
    with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(PAGE))
    if lines.is_file() and (rest := -lines.stat().st_size % PAGE):
        with open(lines, "ab") as file:
            file.write(bytes(rest))


def failing(owner, name, call, fault):
    """A method of the program before whose `call`-th call, counted from 1, a fault happens."""
    calls, real = itertools.count(1), getattr(owner, name)

    def method(*arguments, **more):
        if next(calls) == call:
            fault()
        return real(*arguments, **more)

    return mock.patch.object(owner, name, method)


FULL = {
    # The call of it: run_train's six steps begin with an evaluation, whose line is the first.
    "metrics.jsonl": (src.callbacks.MetricsFile, "add", 6),
    "samples.jsonl": (src.callbacks, "asdict", 2),
    "checkpoint-4": (CheckpointWriter, "_check_space", 2),
    "model": (src.run.Run, "export", 1),
    "result.json": (src.run.Run, "_result", 1),
    "README.md": (src.run, "model_card", 1),
}


@pytest.mark.parametrize(
    "file", [name if name == "metrics.jsonl" else pytest.param(name, marks=pytest.mark.slow) for name in FULL]
)
def test_a_disk_that_is_full_at_any_write_leaves_a_run_that_goes_on(whole, run, file):
    owner, name, call = FULL[file]
    with small_disk(run, 8 * MIB):
        lines = run / (file if file.endswith("jsonl") else "none")
        with failing(owner, name, call, lambda: fill(run, lines)):
            done = run_train("--config", whole / "recipe.yaml", "--training.keep_checkpoints=2")
        assert done.code == 2, done.stderr
        error = done.stderr.partition("error: ")[2]
        assert f"{run / file} could not be written" in error
        assert "No space left on device" in error or "needs about" in error
        assert "use --resume" in error
        assert "Traceback" not in done.stderr
        (run / "filler").unlink()
        assert_loads(checkpoints(run)[-1])
        done = run_train("--config", whole / "recipe.yaml", "--training.keep_checkpoints=2", "--resume")
        assert done.code == 0, done.stderr
        assert_same_run(run, whole / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_told_with_the_way_out(whole, run):
    with small_disk(run, 8 * MIB):
        with failing(src.run.Run, "record", 1, lambda: fill(run, run / "none")):
            done = run_train("--config", whole / "recipe.yaml")
        assert done.code == 2
        assert f"error: {run / 'plan.json'} could not be written" in done.stderr
        assert f"there is no checkpoint yet: mend that, remove {run}, and start again" in done.stderr
        (run / "filler").unlink()


@pytest.mark.slow
def test_a_disk_that_turns_read_only_leaves_the_last_checkpoint(whole, run):

    def mount(*arguments):
        subprocess.run(["mount", *arguments, str(run)], check=True)

    def turn():  # by a mount above it: that of a file system with a file open for writing, the run's lock, is refused
        mount("--bind", str(run))
        mount("-o", "remount,bind,ro")

    with small_disk(run, 8 * MIB):
        with failing(src.callbacks.MetricsFile, "add", 6, turn):
            done = run_train("--config", whole / "recipe.yaml")
        assert done.code == 2, done.stderr
        assert f"error: {run / 'metrics.jsonl'} could not be written" in done.stderr
        assert "Read-only file system" in done.stderr
        assert_loads(checkpoints(run)[-1])
        again = run_train("--config", whole / "recipe.yaml", "--resume")
        assert again.code == 2
        assert f"error: {run} cannot be made, as {run} may not be written to" in again.stderr
        subprocess.run(["umount", str(run)], check=True)
        done = run_train("--config", whole / "recipe.yaml", "--resume")
        assert done.code == 0, done.stderr
        assert_same_run(run, whole / "whole")


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["train.arrow", pytest.param("eval.jsonl", marks=pytest.mark.slow)])
def test_prepared_rows_that_a_disk_changed_are_named_and_made_again(tmp_path, file):
    recipe, outputs = write_recipe(tmp_path), tmp_path / "outputs"
    assert run_train("--config", recipe, "--output.name", "first").code == 0
    (damaged,) = [path for path in outputs.glob(f".data/*/source-*/shard-*/{file}") if path.stat().st_size > 400]
    before = damaged.read_bytes()
    flip(damaged)
    assert damaged.stat().st_size == len(before)
    done = run_train("--config", recipe, "--output.name", "second")
    assert done.code == 0, done.stderr
    assert f"warning: {damaged} holds other bytes than were written" in done.stderr
    assert damaged.read_bytes() == before
    assert_same_run(outputs / "second", outputs / "first")
    done = run_train("--config", recipe, "--output.name", "third")
    assert "other bytes" not in done.stderr


def test_a_clock_that_jumps_changes_nothing(whole, run):
    jumps, real = itertools.cycle([-86_400, 0, 3_600, -1_000_000, 40_000_000]), time.time_ns

    def jumping_ns():
        return real() + next(jumps) * 10**9

    def age():
        for path in checkpoints(run):
            os.utime(path, (4e9, 4e9))

    with (
        mock.patch("time.time", side_effect=lambda: jumping_ns() / 1e9),
        mock.patch("time.time_ns", side_effect=jumping_ns),
        failing(CheckpointWriter, "_put_in_place", 2, age),
    ):
        done = run_train("--config", whole / "recipe.yaml", "--training.keep_checkpoints=2")
        assert done.code == 0, done.stderr
        stop_after(run, 4)
        done = run_train("--config", whole / "recipe.yaml", "--training.keep_checkpoints=2", "--resume")
    assert done.code == 0, done.stderr
    assert "step 5/6  loss" in done.stderr
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    assert_same_run(run, whole / "whole")


def test_prepared_rows_are_removed_by_the_order_of_use_wherever_the_clock_stands(tmp_path):
    entries = [tmp_path / f"{number:032x}" for number in range(4)]
    # Each clock stands before the one at which the last entry was used.
    for entry, now in zip(entries, (4_000_000_000, 2_000_000_000, 1_000_000_000, 1_000_000_001), strict=True):
        with mock.patch("time.time_ns", return_value=now * 10**9):
            prepared(entry, lambda folder: (folder / "rows").write_bytes(bytes(1000))).release()
    with mock.patch("time.time_ns", return_value=0):
        prepared(entries[1], lambda _: None).release()  # used once more, after all others
    order = sorted(entries, key=lambda entry: (entry / IN_USE).stat().st_mtime_ns)
    assert order == [entries[index] for index in (0, 2, 3, 1)]
    size = src.eviction._bytes_below(entries[0])
    keep_within(tmp_path, 2 * size / GIB, keep=tmp_path / "none")
    assert [entry.exists() for entry in entries] == [False, True, False, True]


@pytest.mark.slow
def test_a_run_ends_when_one_of_its_processes_is_killed_and_goes_on(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows())
    training = {"max_steps": 300, "save_every_steps": 100, "accumulation_steps": 1, "keep_checkpoints": 1}
    recipe = write_recipe(tmp_path, data={"train": [{"path": str(rows)}]}, training=training)
    run = tmp_path / "outputs" / "run"
    assert launch("--config", recipe, "--output.name", "whole").returncode == 0
    log = tmp_path / "log"
    child = start(launch_command("--config", recipe), log)
    while not (run / "checkpoint-100").is_dir():
        assert child.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    ranks = [one for one in psutil.Process(child.pid).children(recursive=True) if one.environ().get("RANK") == "1"]
    assert len(ranks) == 1
    os.kill(ranks[0].pid, signal.SIGKILL)
    assert child.wait(120) != 0
    assert f"(pid: {ranks[0].pid})" in log.read_text()
    assert "SIGKILL" in log.read_text()
    assert metrics_of(run)[-1]["step"] < 300
    assert not (run / "model").exists()
    again = launch("--config", recipe, "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    weights, expected = weights_of(run / "model"), weights_of(tmp_path / "outputs" / "whole" / "model")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert json.loads((run / "result.json").read_text())["steps"] == 300
