"""Trials of runs of several processes: each tries its part, all at once, and one that fails ends them all."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from config.loader import read_command_line
from src.trial_process import measure_costs
from tests.processes import launch_processes
from tests.sharded_run import shipped_settings
from tests.test_trial import WITHIN, needs_peaks, recipe_of
from tests.tiny_run import ROOT, write_recipe

ENTRY = """
import contextlib, json, os, socket, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[4])
place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
seen = {name: os.environ.get(name) for name in ("WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")}
if rank == 0:
    with socket.create_server(place) as server:
        seen["heard"] = server.accept()[0].recv(100).decode()
else:
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(place) as line:
            line.sendall(b"from the second")
            break
        time.sleep(0.05)
phases = [{"name": name, "seconds": 1.0, "resident_bytes": (rank + 1) << 30} for name in ("start", "ordinary step")]
report = {"phases": phases, "steps": 1, "tokens": 8, "ordinary_tokens": [4], "worst": seen}
(folder / f"report-{rank}.json").write_text(json.dumps(report))
"""
"""In the place of `train.py`, so that it takes no time: both meet, and tell what they were given."""

SHARDED = ROOT / "tests" / "sharded_entry.py"

FAILS = "if rank == 1:\n    sys.exit('error: it does not go')\ntime.sleep(600)\n"


def measure(folder, entry, config, options=()):
    """Both processes' costs, as `folder`/<rank>.json."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'place'}", **place())
    costs = measure_costs(read_command_line(["--config", str(config), *options]).config, entry)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(costs.to_dict()))


def place():
    return {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def costs_of_both(folder, entry, config):
    launch_processes(measure, folder, entry, config)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


def test_each_process_tries_its_part_where_all_meet_at_another_place(tmp_path):
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY)
    costs = costs_of_both(tmp_path, entry, write_recipe(tmp_path))
    assert costs["outcome"] == "measured", costs["reason"]
    assert costs["peak_mib_by_process"] == [{"resident": 1024}, {"resident": 2048}]
    # Where the variable of torchrun is set, torch expects that the place is open already.
    seen = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": None, "heard": "from the second"}
    assert costs["worst_micro_batches"] == seen
    assert not (tmp_path / "outputs").exists()


def test_a_process_whose_trial_fails_ends_the_others_and_is_the_one_that_is_told(tmp_path):
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY + FAILS)
    began = time.monotonic()
    costs = costs_of_both(tmp_path, entry, write_recipe(tmp_path))
    assert time.monotonic() - began < 60
    assert (costs["outcome"], costs["reason"]) == ("failed", "it does not go (exit code 1)")
    assert not (tmp_path / "outputs").exists()


def assert_like(run, costs):
    """The first process of a run took at most what that of its trial did, in MiB; with `pytest -s` both are shown."""
    assert costs["outcome"] == "measured", costs["reason"]
    peaks = [peaks["resident"] for peaks in costs["peak_mib_by_process"]]
    print(f"\n{run} of {peaks[0]} MiB: {run / peaks[0]:.3f}; the other process's trial took {peaks[1]}")
    start = costs["phases"][0]["resident_mib"]
    assert min(peaks) - start > 150
    assert run == pytest.approx(peaks[0], rel=WITHIN)


EIGHT_STEPS = ("--training.micro_batch_rows", "4", "--training.max_steps", "8")
"""So that a process comes by batches about as large as the largest of all."""


@pytest.mark.slow
@needs_peaks
def test_processes_take_the_memory_that_their_trial_took(tmp_path):
    recipe = recipe_of(tmp_path, "packed, all weights")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "config/accelerate/ddp_cpu.yaml", "train.py", "--config", str(recipe), *EIGHT_STEPS]
    for more in (["--plan"], []):
        done = subprocess.run([*launch, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if more:
            outputs = tmp_path / "outputs"
            costs = json.loads((outputs / "run" / "plan.json").read_text())["costs"]
            shutil.rmtree(outputs / "run")
            assert [path.name for path in outputs.iterdir()] == [".data"]
    result = json.loads((outputs / "run" / "result.json").read_text())
    assert costs["projection"]["steps"] == result["steps"]
    assert_like(result["peak_memory"]["resident_mib"], costs)


def measure_sharded(folder, recipe):
    os.environ.update(shipped_settings())
    measure(folder, SHARDED, recipe, EIGHT_STEPS)


@pytest.mark.slow
@needs_peaks
def test_processes_that_share_the_weights_take_the_memory_that_their_trial_took(tmp_path):
    recipe = recipe_of(tmp_path, "packed, all weights")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SHARDED)]
    done = subprocess.run(
        [*command, "--config", str(recipe), *EIGHT_STEPS],
        cwd=ROOT,
        env=os.environ | shipped_settings(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "outputs" / "run" / "result.json").read_text())
    launch_processes(measure_sharded, tmp_path, recipe)
    costs = json.loads((tmp_path / "0.json").read_text())
    assert_like(result["peak_memory"]["resident_mib"], costs)
