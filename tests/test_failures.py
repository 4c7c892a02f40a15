"""What a reader sees where one of several processes fails."""

import json
import os
import re
import subprocess
import sys
import time

from tests.tiny_run import ROOT, write_recipe

LONGEST_S = 60
"""From the failure to the end of the launch: the launcher gives the other process 30 seconds before it kills it, which
waits 5 before it says what it has lost; the rest is for a machine that does other things too."""

# In every process, a warning as libraries give them. In the second one an exception is raised in the middle of a step,
# wherever the main thread is by then, once two lines of the log are written.
RECIPE = """
import logging, os, pathlib, signal, threading, time, warnings
from config.loader import load_recipe

config = load_recipe(pathlib.Path({recipe!r}))
logging.getLogger("transformers.planted").warning("logged: %s", "planted")
warnings.warn("warned: " + "planted")
metrics = pathlib.Path({folder!r}, "outputs", "run", "metrics.jsonl")

def fail(number, frame):
    pathlib.Path({folder!r}, "failed").write_text(str(time.time()))
    raise OSError("the rows of this machine " + "are gone")

def watch():
    while not metrics.exists() or metrics.read_text().count("loss") < 3:
        time.sleep(0.05)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

if os.environ["RANK"] == "1":
    signal.signal(signal.SIGALRM, fail)
    threading.Thread(target=watch, daemon=True).start()
"""


def test_an_error_of_one_process_is_told_whole_once_and_by_its_name(tmp_path):
    training = {"max_steps": 100_000, "save_every_steps": None}
    plain = write_recipe(tmp_path, training=training)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(recipe=str(plain), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config/accelerate/ddp_cpu.yaml"]
    done = subprocess.run(
        [*launch, "train.py", "--config", recipe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "failed").read_text()) < LONGEST_S
    told = re.findall(
        r"^error: process 1 of 2, on \S+, has failed:\n"
        r"Traceback \(most recent call last\):\n(?: +\S.*\n)+"
        r"OSError: the rows of this machine are gone\n",
        done.stderr.replace("[rank1]: ", ""),  # which torch writes before each line once it knows the others
        re.MULTILINE,
    )
    assert len(told) == 1, done.stderr[-5000:]
    assert 'train.py", line' in told[0]
    assert done.stderr.count("OSError: the rows of this machine are gone") == 1
    assert done.stderr.count("logged: planted") == 1
    assert done.stderr.count("UserWarning: warned: planted") == 1
    assert not (tmp_path / "outputs" / "run" / "model").exists()
    lines = (tmp_path / "outputs" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"loss"' in line]
    assert steps == list(range(1, len(steps) + 1))  # the main process alone writes them


def failing(error, *, wait_s=30, **environment):
    """What a process says that ends with an error, and after how many seconds.

    Args:
        wait_s: what it waits where it has lost another process.
    """
    wait = f"failures.OTHERS_WAIT_S = {wait_s}"
    code = f"from utils import failures\n{wait}\nfailures.name_failing_process()\nraise {error}"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    return done.stderr, time.monotonic() - started


def test_a_process_that_has_lost_another_lets_that_one_speak_first():
    two = {"RANK": "0", "WORLD_SIZE": "2"}
    lost = "RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1')"
    told, seconds = failing(lost, wait_s=2, **two)
    assert told.count("error: process 0 of 2, on ") == told.count("Connection closed by peer") == 1
    assert seconds > 2
    told, seconds = failing("RuntimeError('the rows are gone')", **two)
    assert told.count("error: process 0 of 2, on ") == told.count("the rows are gone") == 1
    assert seconds < 30


def test_a_process_that_is_alone_fails_as_python_does():
    told, _ = failing("RuntimeError('the rows are gone')", RANK="0", WORLD_SIZE="1")
    assert told.splitlines()[0] == "Traceback (most recent call last):"
    assert "process 0" not in told
