"""What a run makes of what `accelerate launch` was asked for, and of what it has not done."""

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.tiny_run import ROOT, write_recipe
from utils.distributed import check_launch
from utils.errors import UserError
from utils.launch_command import Asked, asked_of_launcher, launch_arguments, read_arguments

MACHINES = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29500"]
DDP, FSDP = "config/accelerate/ddp.yaml", "config/accelerate/fsdp2.yaml"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["python", "/env/bin/accelerate", "launch", "--cpu", "train.py"], ["--cpu", "train.py"]),
        (["python", "-X", "dev", "-m", "accelerate.commands.launch", "train.py"], ["train.py"]),
        (["/usr/bin/python3", "/env/bin/accelerate-launch", "train.py"], ["train.py"]),
        (["python", "/env/lib/accelerate/commands/launch.py", "train.py"], ["train.py"]),
        (["C:/env/Scripts/accelerate.exe", "launch", "train.py"], ["train.py"]),
        (["python", "/env/bin/torchrun", "--nproc_per_node", "2", "train.py"], None),
        (["python", "-m", "torch.distributed.run", "train.py"], None),
        (["bash", "-c", "accelerate launch --num_processes 2 train.py"], None),
        (["python", "sweep.py", "accelerate", "launch", "--num_processes", "2"], None),
        (["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], None),
        (["python", "/env/bin/accelerate", "test"], None),
        ([], None),
    ],
)
def test_only_a_command_of_accelerate_launch_is_read(command, arguments):
    assert launch_arguments(command) == arguments


@pytest.mark.parametrize(
    ("arguments", "processes", "engine"),
    [
        ([], 1, None),
        (["--num_processes", "2"], 2, None),
        (["--cpu", *MACHINES], 2, None),
        (["--cpu", "--num-processes", "4", *MACHINES], 4, None),
        (["--config_file", DDP], 8, None),
        (["--config_file", DDP, "--num_processes", "2"], 2, None),
        (["--config_file", FSDP], 8, "FSDP"),
        (["--config_file", FSDP, "--cpu", "--num_processes", "1"], 1, "FSDP"),
        (["--config_file", FSDP, "--multi_gpu", "--num_processes", "2"], 2, None),
        (["--use_fsdp", "--num_processes", "2"], 2, "FSDP"),
        (["--use_deepspeed", "--num_processes", "2"], 2, "DEEPSPEED"),
    ],
)
def test_the_launchers_arguments_are_read_as_the_launcher_reads_them(arguments, processes, engine, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = [*arguments, "train.py", "--num_processes", "9"]
    asked = read_arguments(line)
    assert (asked.processes, asked.engine) == (processes, engine)
    theirs, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert max(theirs.num_processes or 1, theirs.num_machines or 1) == processes
    assert (theirs.use_fsdp, theirs.use_deepspeed) == (engine == "FSDP", engine == "DEEPSPEED")


def test_the_users_own_config_file_counts_unless_the_cpu_is_asked_for(tmp_path, monkeypatch):
    file = tmp_path / "default_config.yaml"
    file.write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 3\n")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    assert read_arguments(["train.py"]) == Asked(3, f"num_processes: 3 in {file}", None)
    assert read_arguments(["--cpu", "train.py"]).processes == 1
    assert read_arguments(["--num_processes", "1", "train.py"]).processes == 1


def test_nothing_is_known_where_another_program_started_the_process(monkeypatch):
    assert asked_of_launcher() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # left by an `accelerate launch` further up
    assert asked_of_launcher() is None
    monkeypatch.setattr(psutil.Process, "parent", lambda process: None)
    assert asked_of_launcher() is None


def accelerate(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )


needs_no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="Accelerate starts several processes here")


@needs_no_gpu
def test_a_run_of_fewer_processes_than_asked_is_refused(tmp_path):
    done = accelerate("--cpu", "--num_processes", "2", "train.py", "--config", write_recipe(tmp_path))
    assert done.returncode != 0
    assert "error: `accelerate launch` was asked for 2 processes (--num_processes 2) and has started 1" in done.stderr
    assert not (tmp_path / "outputs").exists()


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--num_processes", "2"], ["--cpu", *MACHINES], ["--config_file", DDP, "--cpu"]])
def test_other_ways_to_get_fewer_processes_than_asked_are_refused_too(tmp_path, arguments):
    done = accelerate(*arguments, "train.py", "--config", write_recipe(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("error: `accelerate launch` was asked for ") == 1
    assert not (tmp_path / "outputs").exists()


@needs_no_gpu
@pytest.mark.slow
def test_a_run_that_asked_for_fsdp_where_accelerate_leaves_it_out_is_refused(tmp_path):
    # Accelerate itself would train it by DDP, and say nothing.
    fsdp = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--main_process_port", "0"]
    done = accelerate(*fsdp, "train.py", "--config", write_recipe(tmp_path))
    assert done.returncode != 0
    # The main process speaks first; on a busy machine the launcher may be late to stop the other.
    assert len(re.findall(r"^error: FSDP is asked for and there is no accelerator.*`$", done.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / "outputs").exists()


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[], ["--cpu"], ["--cpu", "--num_processes", "1"], ["--config_file", DDP, "--num_processes", "2"]]
)
def test_runs_that_got_what_was_asked_for_train(tmp_path, arguments):
    done = accelerate(*arguments, "train.py", "--config", write_recipe(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


def test_launchers_that_mpirun_has_started_beside_each_other_are_counted(monkeypatch):
    monkeypatch.setattr("utils.distributed.asked_of_launcher", lambda: Asked(4, "--num_processes 4", None))
    with pytest.raises(UserError, match=r"asked for 4 processes \(--num_processes 4\) and has started 1:"):
        check_launch()
    monkeypatch.setenv("PMI_SIZE", "4")
    check_launch()
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="asked for 4 processes"):
        check_launch()
