"""What a signal does to a run of one process or two, and what a run says that needs longer than it has."""

import os
import re
import signal
import time

import pytest

from src.stopping import too_short_grace
from tests.test_launch import launch_command, start
from tests.tiny_run import run_train, write_recipe
from utils.checkpointing import checkpoints


def wait_for(log, pattern):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and re.search(pattern, log.read_text(errors="replace")):
            return
        time.sleep(0.005)
    raise AssertionError(log.read_text(errors="replace") if log.exists() else "it said nothing")


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_processes_of_which_one_gets_a_signal_save_the_same_step_and_leave(fork_server, tmp_path, number):
    recipe = write_recipe(tmp_path, training={"max_steps": 5000, "save_every_steps": 4000, "micro_batch_rows": 1})
    log, run = tmp_path / "log", tmp_path / "outputs" / "run"
    children = fork_server.start_all(["--config", recipe], processes=2, log=log)
    wait_for(tmp_path / "log0", r"step 3/5000  loss")
    os.kill(children[1].pid, number)
    said = tmp_path / "log0"
    assert [child.wait() for child in children] == [128 + number] * 2, said.read_text()
    steps = re.findall(rf"^stopped by {number.name} after step (\d+), which is saved; --resume", said.read_text(), re.M)
    assert len(steps) == 1
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{steps[0]}"]
    assert (run / f"checkpoint-{steps[0]}" / "checkpoint.json").exists()
    assert not (run / "model").exists()
    assert (tmp_path / "log1").read_text() == "", "the main process alone speaks"


def test_a_second_interrupt_ends_a_run_at_once_and_one_before_the_first_step_too(fork_server, tmp_path):
    # A step of 500 micro-batches takes seconds, in the midst of which both interrupts come.
    recipe = write_recipe(
        tmp_path, training={"max_steps": 50, "accumulation_steps": 500, "micro_batch_rows": 1, "save_every_steps": 50}
    )
    log, run = tmp_path / "log", tmp_path / "outputs" / "run"
    child = fork_server.start(["--config", recipe], log=log)
    wait_for(log, r"step 1/50  loss")
    os.kill(child.pid, signal.SIGINT)
    wait_for(log, r"(?m)^SIGINT: the run is saved after the step under way; SIGINT ends it at once")
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == -signal.SIGINT
    assert checkpoints(run) == []
    for name, number, codes in (("a", signal.SIGINT, {130}), ("b", signal.SIGUSR1, {-signal.SIGUSR1})):
        child = fork_server.start(["--config", recipe, "--output.name", name], log=tmp_path / name)
        wait_for(tmp_path / name, r"1 process\(es\) on cpu")
        os.kill(child.pid, number)
        assert child.wait() in codes, (tmp_path / name).read_text()


SWALLOWS = """
import os, signal, time
from pathlib import Path
from config.recipe import load_recipe
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except:  # as the fingerprints of `datasets` do, which are made while data is prepared
    pass
config = load_recipe(Path({recipe!r}))
"""


def test_an_interrupt_that_a_library_swallows_ends_a_run_before_its_first_step(fork_server, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(SWALLOWS.format(recipe=str(write_recipe(tmp_path))))
    child = fork_server.start(["--config", recipe], log=tmp_path / "log")
    assert child.wait() == 130, (tmp_path / "log").read_text()
    assert "error: SIGINT ended the run outside of its training steps" in (tmp_path / "log").read_text()
    assert not (tmp_path / "outputs" / "run").exists()


def test_a_grace_period_that_is_too_short_is_told_once_with_what_it_lacks(tmp_path):
    recipe = write_recipe(tmp_path, training={"max_steps": 6, "save_every_steps": 1})
    done = run_train("--config", recipe, "--training.grace_period_s", "0.0001")
    assert done.code == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "from a signal to the end" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert "more than training.grace_period_s=0.0001" in said[0]
    done = run_train("--config", recipe, "--output.name", "patient")
    assert "from a signal to the end" not in done.stderr


def test_a_grace_period_is_compared_with_a_step_and_a_checkpoint_and_an_evaluation():
    assert too_short_grace(10.0, 20.0, 30.0) is None
    assert "needs up to 30.5 s (step 10.0 s + checkpoint 20.5 s), more than" in too_short_grace(10.0, 20.5, 30.0)
    assert "needs up to 31.0 s (step 10.0 s + checkpoint 20.0 s + evaluation 1.0 s)" in too_short_grace(10, 20, 30, 1)


@pytest.mark.slow
def test_a_launcher_that_is_asked_to_end_has_its_processes_save_first(tmp_path):
    recipe = write_recipe(tmp_path, training={"max_steps": 5000, "save_every_steps": 4000, "micro_batch_rows": 1})
    log, run = tmp_path / "log", tmp_path / "outputs" / "run"
    launcher = start(launch_command("--config", recipe), log)
    wait_for(log, r"step 3/5000  loss")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(120) not in (0, None)
    step = re.search(r"stopped by SIGTERM after step (\d+), which is saved", log.read_text())[1]
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{step}"]
