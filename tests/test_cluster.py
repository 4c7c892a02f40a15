"""The scripts for clusters, run as they stand, with stand-ins for Slurm's and SkyPilot's commands and variables."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.tiny_run import ROOT, write_recipe

SBATCH = ROOT / "scripts" / "cluster" / "train.sbatch"
SKY = ROOT / "scripts" / "cluster" / "train.sky.yaml"

# As Slurm's: a task on each machine, each with its SLURM_NODEID, and the exit code of the worst.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do wait "$task" || worst=$?; done
exit $worst
"""
# Says how it was called, and ends as it is told to: when it gets SIGTERM if it is to wait.
ACCELERATE = """#!{python}
import json, os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
kept = ("MAIN_HOST", "MAIN_PORT", "PROCESSES", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "SLURM_NODEID")
told = {{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in kept}}}}
rank = sys.argv[sys.argv.index("--machine_rank") + 1]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
(folder / f"pid-{{rank}}").write_text(f"{{os.getpid()}}\\n")
(folder / f"called-{{rank}}.json").write_text(json.dumps(told))
while (folder / "waits").exists():
    time.sleep(0.05)
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""
SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then printf 'node07\\nnode08\\n'; else echo "scontrol $*" >> {folder}/slurm; fi
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> {folder}/slurm
kill -TERM $(cat {folder}/pid-*)
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with a recipe, and the environment of a job on two machines of four GPUs."""
    commands = tmp_path / "bin"
    commands.mkdir()
    root = tmp_path / "root"  # without a .venv, whose accelerate would come first
    root.mkdir()
    (root / "scripts").symlink_to(ROOT / "scripts")
    python = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n'
    texts = {"srun": SRUN, "accelerate": ACCELERATE, "scontrol": SCONTROL, "scancel": SCANCEL, "python": python}
    for name, text in texts.items():
        filled = text if name in ("srun", "python") else text.format(folder=str(tmp_path), python=sys.executable)
        (commands / name).write_text(filled)
        (commands / name).chmod(0o755)
    write_recipe(tmp_path)
    yield {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    (tmp_path / "waits").unlink(missing_ok=True)  # so that no stand-in outlives a test that fails


def submit(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    command = ["bash", str(SBATCH), "--config", str(folder / "recipe.yaml"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(job: subprocess.Popen, code: int) -> None:
    told, _ = job.communicate(timeout=120)
    assert job.returncode == code, told


def calls(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("called-*.json"))]


def slurm(folder: Path) -> list[str]:
    return (folder / "slurm").read_text().splitlines() if (folder / "slurm").exists() else []


def launch_words(recipe: Path, rank: int, host: str, port: int, file: str = "ddp") -> list[str]:
    return shlex.split(
        f"launch --config_file config/accelerate/{file}.yaml --num_machines 2 --num_processes 8 --machine_rank {rank} "
        f"--main_process_ip {host} --main_process_port {port} train.py --config {recipe}"
    )


@pytest.mark.parametrize("script", [SBATCH, SKY], ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    text = script.read_text() if script is SBATCH else yaml.safe_load(script.read_text())["run"]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_slurm_starts_one_launcher_a_machine_that_knows_the_first(tmp_path, cluster):
    finished(submit(tmp_path, cluster, "--optim.learning_rate", "1e-3"), 0)
    more = ["--optim.learning_rate", "1e-3"]
    words = [[*launch_words(tmp_path / "recipe.yaml", rank, "node07", 24711), *more] for rank in (0, 1)]
    assert [call["arguments"] for call in calls(tmp_path)] == words
    assert [call["environment"]["SLURM_NODEID"] for call in calls(tmp_path)] == ["0", "1"]
    assert calls(tmp_path)[0]["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "270"
    assert slurm(tmp_path) == []


def test_slurm_goes_on_from_checkpoints_and_takes_another_launch_file(tmp_path, cluster):
    (tmp_path / "outputs" / "run" / "checkpoint-4").mkdir(parents=True)
    cluster |= {"LAUNCH_FILE": "config/accelerate/fsdp2.yaml"}
    finished(submit(tmp_path, cluster), 0)
    words = [*launch_words(tmp_path / "recipe.yaml", 1, "node07", 24711, "fsdp2"), "--resume"]
    assert calls(tmp_path)[1]["arguments"] == words


def test_slurms_signal_ends_the_launchers_and_queues_the_job_again(tmp_path, cluster):
    (tmp_path / "waits").touch()
    job = submit(tmp_path, cluster)
    while len(list(tmp_path.glob("called-*.json"))) < 2 and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    finished(job, 1)
    assert slurm(tmp_path) == ["scancel --signal=TERM 4711", "scontrol requeue 4711"]


def test_a_job_that_fails_by_itself_is_not_queued_again(tmp_path, cluster):
    finished(submit(tmp_path, cluster | {"ENDS_WITH": "3"}), 3)
    assert slurm(tmp_path) == []
    bad = submit(tmp_path, cluster, "--optim.learning_rat", "1e-3")
    finished(bad, 2)
    assert slurm(tmp_path) == []


def test_a_job_that_starts_again_before_its_first_checkpoint_puts_its_folder_aside(tmp_path, cluster):
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "config.json").touch()
    finished(submit(tmp_path, cluster), 0)
    assert (run / "config.json").exists()  # at its first start a folder that is there is another run's
    finished(submit(tmp_path, cluster | {"SLURM_RESTART_COUNT": "1"}), 0)
    assert not run.exists()
    assert (run.with_name("run.start-1") / "config.json").exists()
    assert "--resume" not in calls(tmp_path)[0]["arguments"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_skypilot_starts_one_launcher_a_machine_that_knows_the_first(tmp_path, cluster, goes_on):
    task = yaml.safe_load(SKY.read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "envs", "setup", "run"}
    if goes_on:
        (tmp_path / "outputs" / "run" / "checkpoint-4").mkdir(parents=True)
    recipe = tmp_path / "recipe.yaml"
    for rank in (0, 1):
        given = {
            "ARGUMENTS": f"--config {recipe}",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "4",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
        }
        subprocess.run(
            ["bash", "-c", task["run"]], cwd=cluster["SLURM_SUBMIT_DIR"], env=cluster | task["envs"] | given, check=True
        )
        words = launch_words(recipe, rank, "10.0.0.1", 29500) + ["--resume"] * goes_on
        assert calls(tmp_path)[rank]["arguments"] == words
