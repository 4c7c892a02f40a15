"""Which processes and devices a run has.

check_launch()
args = TrainingArguments(...)  # joins the group of processes
check_world(processes=args.world_size)
"""

import gc
import os
import secrets
import time
from pathlib import Path

import psutil
import torch

from utils.errors import UserError
from utils.launch import processes_started
from utils.launch_command import asked_of_launcher, engine_told, mpi_processes
from utils.logging import get_logger

log = get_logger(__name__)

LEAVE_S = 0.5
"""Seconds that the threads of a process group have to give up what they hold; they look for it every 5 ms."""


def accelerator_name() -> str:
    """The device type that trains: `cuda`, `mps`, `xpu` ..., or `cpu` where there is none."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def check_launch() -> None:
    """Make sure that as many processes were started as were asked for, and that they are told how to find each other.

    Raises:
        UserError: WORLD_SIZE is above 1 and another variable that launchers set beside it is not there, or `accelerate
            launch` was asked for more processes than it has started.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if processes_started() > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={processes_started()} is set, as a launcher of several processes does, but not "
            f"{', '.join(missing)}; start them with `accelerate launch --config_file config/accelerate/ddp.yaml "
            "train.py ...`, or unset WORLD_SIZE to train with this process alone"
        )
    asked = asked_of_launcher()
    if asked is not None and asked.processes > max(processes_started(), mpi_processes()):
        raise UserError(
            f"`accelerate launch` was asked for {asked.processes} processes ({asked.source}) and has started "
            f"{processes_started()}: with --cpu, or without an accelerator, it starts one, and on several machines as "
            "many on each. Launch with a file of config/accelerate, such as `accelerate launch --config_file "
            "config/accelerate/ddp_cpu.yaml train.py ...`, or give --num_processes 1 to train with one"
        )


def asks_for_fsdp() -> bool:
    """Whether `accelerate launch` asks for FSDP, which gives each process a part of every weight."""
    return engine_told() == "FSDP"


def shards_weights() -> bool:
    """Whether `accelerate launch` asks for FSDP or DeepSpeed, which give each process a part of every matrix."""
    return engine_told() is not None


def leave_group() -> None:
    """Leave the group of processes; to be called when nothing that used it is needed any more.

    A thread of the group that still has to give up a tensor needs the interpreter's lock for that, which it gets during
    the pause. Without one it aborts the process as the interpreter ends (pytorch/pytorch#179291), or waits for ever: it
    holds the group's own lock, for which the group waits that is collected here, with the interpreter's lock in hand.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(LEAVE_S)
        torch.distributed.destroy_process_group()
        gc.collect()
        time.sleep(LEAVE_S)


def use_cores(threads: int | None) -> int:
    """Set how many threads this process computes with on a CPU, and return their number.

    Args:
        threads: None: this process's share of the machine's cores where `accelerate launch` has set one thread, as it
            does unless it is told otherwise; else what the environment or torch says.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if threads is None and launched:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(usable, psutil.cpu_count(logical=False) or usable)
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def check_one_gpu(visible: int) -> None:
    """
    Args:
        visible: GPUs that this process sees.
    Raises:
        UserError: there are several, to which Trainer would give a copy of the model each in this one process.
    """
    if visible > 1:
        raise UserError(
            f"one process sees {visible} GPUs; start one for each with `accelerate launch train.py ...`, or show it "
            "one with CUDA_VISIBLE_DEVICES=0"
        )


def check_world(processes: int) -> None:
    """Compare the processes that the launcher started with those that know of each other.

    Args:
        processes: processes in the group, as the trainer sees them.
    Raises:
        UserError: the numbers differ, so that each process would train alone and write the same files.
    """
    started = processes_started()
    if started != processes:
        raise UserError(
            f"the launcher started {started} processes (WORLD_SIZE), but each believes in {processes}: they "
            "would train apart and overwrite each other. Launch with a file of config/accelerate, such as "
            "`accelerate launch --config_file config/accelerate/ddp_cpu.yaml train.py ...` on a machine without a GPU"
        )


def check_shared_folder(run: Path, device: torch.device) -> None:
    """Find out whether all processes write to one folder, and say what that means for checkpoints where they do not.

    Every process of the group calls this together.

    Args:
        run: the run's directory, which the main process makes.
        device: of this process's tensors.
    Raises:
        UserError: they do not, and each holds a part of the weights, so that no checkpoint would be whole anywhere.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    main = torch.distributed.get_rank() == 0
    token = torch.tensor(secrets.randbits(62) if main else 0, device=device)
    torch.distributed.broadcast(token, src=0)
    mark = run / f".seen-{int(token)}"
    if main:
        run.mkdir(parents=True, exist_ok=True)
        mark.touch()
    torch.distributed.barrier()
    seen = torch.tensor(int(mark.exists()), device=device)
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MIN)
    if main:
        mark.unlink()
    if bool(seen):
        return
    found = f"{run} on the first machine is not {run} on every other"
    if shards_weights():
        raise UserError(
            f"{found}, and a checkpoint of sharded weights is written by all processes into one folder; give an "
            "output.folder on a disk that the machines share, or training.save_every_steps=None"
        )
    log.warning(
        "%s: checkpoints stand on the first machine alone; copy one to the others, to the same place, before --resume. "
        "What the others' processes drew at random, as dropout does, is not in it",
        found,
    )
