"""Two runs in one folder: the second is told who has it, and a run that was killed keeps nobody out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from config.schema import OutputConfig
from src.run_lock import FILE, run_lock
from tests.tiny_run import ROOT, run_train, write_recipe
from utils.errors import UserError

HOLD = """
import sys, time
from config.schema import OutputConfig
from src.run_lock import run_lock
with run_lock(OutputConfig(folder=sys.argv[1], name="run")):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, rank="0"):
    """A process that has the run directory `run` of a folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "RANK": rank},
    )
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_run_in_a_folder_is_refused_with_who_has_it_and_a_killed_one_keeps_nobody_out(tmp_path):
    recipe, run = write_recipe(tmp_path, training={"max_steps": 1}), tmp_path / "outputs" / "run"
    child = holder(tmp_path / "outputs")
    try:
        since = json.loads((run / FILE).read_text())["since"]
        assert abs((datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()) < 60
        started = time.monotonic()
        for arguments in ([], ["--resume"]):
            done = run_train("--config", recipe, *arguments)
            assert done.code == 2
            who = f"process {child.pid} on {socket.gethostname()}, since {since}"
            assert f"error: {run} is in use by another run ({who})" in done.stderr
            assert "--output.name NAME" in done.stderr
        assert time.monotonic() - started < 10, "at once"
        assert {path.name for path in run.iterdir()} == {FILE}
        assert run_train("--config", recipe, "--output.name", "beside").code == 0
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (run / FILE).is_file(), "a killed process removes nothing"
        done = run_train("--config", recipe)
        assert done.code == 0, done.stderr
        assert not (run / FILE).exists()
    finally:
        child.kill()
        child.wait()


def test_the_processes_of_a_run_share_its_lock(tmp_path, monkeypatch):
    main = holder(tmp_path)
    try:
        monkeypatch.setenv("RANK", "1")
        with run_lock(OutputConfig(folder=str(tmp_path), name="run")):
            pass
        assert (tmp_path / "run" / FILE).is_file(), "another process of the run leaves the lock"
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="is in use by another run"), run_lock(OutputConfig(str(tmp_path), "run")):
            pass
    finally:
        main.kill()
        main.wait()


def test_a_lock_without_a_holders_name_is_refused_all_the_same(tmp_path):
    child = holder(tmp_path)
    try:
        (tmp_path / "run" / FILE).write_text("")  # as on a full disk
        with pytest.raises(UserError, match="it does not say which"), run_lock(OutputConfig(str(tmp_path), "run")):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with run_lock(OutputConfig(str(tmp_path / "a" / "b"), "run")):
        assert (tmp_path / "a" / "b" / "run" / FILE).is_file()
    assert list(tmp_path.iterdir()) == []
