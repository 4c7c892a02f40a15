"""What `accelerate launch` was asked for, where it started this process.

It drops part of what it is asked for without a word: without an accelerator, or with `--cpu`, it starts one
process whatever `--num_processes` and `--num_machines` say, and nothing that it hands on tells how many were meant. Its
own command line does, with the file that it reads.

    asked = asked_of_launcher()
    if asked is not None and asked.processes > processes_started():
        ...
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import psutil
from accelerate.utils import str_to_bool

ENGINES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
"""What shards weights, and the variable that `accelerate launch` tells its processes so with."""


@dataclass(frozen=True)
class Asked:
    """What a command line of `accelerate launch` and its config file ask for."""

    processes: int
    """In all, over every machine."""
    source: str
    """Where that number stands."""
    engine: str | None
    """`FSDP` or `DEEPSPEED`. None: nothing shards weights."""


def asked_of_launcher() -> Asked | None:
    """What `accelerate launch` was asked for; None where something else started this process, or nothing is known."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which it sets whatever it starts
        return None
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    arguments = launch_arguments(command)
    return None if arguments is None else read_arguments(arguments)


def launch_arguments(command: Sequence[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a process's command line; None where it is another program's."""
    for place, word in enumerate(command):
        path = PurePath(word)
        if path.stem == "accelerate" and list(command[place + 1 : place + 2]) == ["launch"]:
            return list(command[place + 2 :])
        module = word == "accelerate.commands.launch" and command[place - 1] == "-m"
        if path.stem == "accelerate-launch" or module or path.parts[-3:] == ("accelerate", "commands", "launch.py"):
            return list(command[place + 1 :])
        if path.suffix == ".py":  # another program, whose arguments are its own
            return None
    return None


def read_arguments(arguments: Sequence[str]) -> Asked:
    """What arguments of `accelerate launch` ask for, with the config file that it reads for them.

    Args:
        arguments: as accelerate took them; a config file's path is relative to this process's folder.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(list(arguments))
    reads_default = os.path.isfile(default_config_file) and not args.cpu
    file = args.config_file or (default_config_file if reads_default else None)
    config = load_config_from_file(args.config_file) if file else None

    def given(name: str) -> tuple[int, str]:
        value = getattr(args, name)
        if value is not None:
            return value, f"--{name} {value}"
        value = getattr(config, name, None)
        return (value, f"{name}: {value} in {file}") if value is not None else (1, f"no --{name}")

    processes = max(given("num_processes"), given("num_machines"), key=lambda found: found[0])
    kind = getattr(getattr(config, "distributed_type", None), "value", None)
    if args.use_fsdp or args.use_deepspeed:
        kind = "FSDP" if args.use_fsdp else "DEEPSPEED"
    elif args.multi_gpu or args.tpu or args.use_megatron_lm:  # which come before the file's word
        kind = None
    return Asked(*processes, engine=kind if kind in ENGINES else None)


def engine_told() -> str | None:
    """What the launcher's variables say that shards weights: `FSDP`, `DEEPSPEED`, or None."""
    return next((engine for engine, name in ENGINES.items() if str_to_bool(os.environ.get(name, "false"))), None)


def mpi_processes() -> int:
    """Processes that mpirun or srun started, each of which may be an `accelerate launch` of its own; 1 without them.

    On a CPU, Accelerate makes one group of them.
    """
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name) or 1) for name in names)
