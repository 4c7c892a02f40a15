"""`train.py` in two processes whose weights are sharded by Accelerate's own FSDP2, on a machine without a GPU.

outcomes = train_sharded(tmp_path, ["--config", recipe], partial(stop_after, run, 4), ["--config", recipe, "--resume"])
assert outcomes == ["", "", ""]

Accelerate shards on accelerators only, and on a CPU falls back to whole copies without a word. All that it does there
stands in one list of kinds of device, which the processes of these tests pass by: from then on everything is its own
code, and ours, over gloo.
"""

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import yaml

from tests.processes import start_processes
from tests.tiny_run import ROOT

Command = Sequence[str | Path] | Callable[[], object]
"""Arguments of `train.py`, or what the first process does alone between two runs."""


def shipped_settings(**changes: str) -> dict[str, str]:
    """What `accelerate launch --config_file config/accelerate/fsdp2.yaml` tells the processes that it starts.

    Args:
        changes: of the file's `fsdp_config`.
    """
    file = yaml.safe_load((ROOT / "config" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))
    settings = {f"FSDP_{name.removeprefix('fsdp_').upper()}": str(value) for name, value in file["fsdp_config"].items()}
    settings |= {f"FSDP_{name.upper()}": value for name, value in changes.items()}
    return settings | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"}


def train_sharded(folder: Path, *commands: Command, **changes: str) -> list[str]:
    """Run commands one after the other in two processes that share their weights.

    Args:
        folder: gets `log-0` and `log-1`, what the processes say.
        changes: of the shipped `fsdp_config`.
    Returns:
        For each command the error that it ended with in the first process, or nothing.
    """
    meeting, outcomes = folder / "meeting", folder / "outcomes.json"
    meeting.unlink(missing_ok=True)
    start_processes(_one_of_two, folder, commands, shipped_settings(**changes))
    return json.loads(outcomes.read_text(encoding="utf-8"))


def _one_of_two(rank: int, folder: Path, commands: Sequence[Command], settings: dict[str, str]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}  # which nobody asks for, as the group is there already
    os.environ.update({name: str(value) for name, value in (place | meeting).items()} | settings)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    with open(folder / f"log-{rank}", "a", encoding="utf-8") as log, _said_to(log):
        outcomes = [_outcome(command, rank) for command in commands]
        if rank == 0:
            (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")
        from utils.distributed import leave_group

        leave_group()


@contextlib.contextmanager
def _said_to(log):
    from utils.logging import set_up_logging

    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        set_up_logging()
        yield


def _outcome(command: Command, rank: int) -> str:
    """What a command ended with; an error that is not the user's ends all."""
    import train
    from config.loader import ConfigError, read_command_line
    from utils.errors import UserError

    torch.distributed.barrier()
    if callable(command):
        if rank == 0:
            command()
        torch.distributed.barrier()
        return ""
    try:
        with sharding_here():
            train.train(read_command_line(list(map(str, command))))
    except (ConfigError, UserError) as error:
        return str(error)
    except BaseException:
        traceback.print_exc()
        raise
    return ""


@contextlib.contextmanager
def sharding_here():
    """Weights are sharded on a CPU too."""
    from src import assembly

    own = partial(_on_an_accelerator, assembly.trainer_arguments)
    with (
        mock.patch.object(assembly, "trainer_arguments", own),
        mock.patch.object(assembly, "check_engine", return_value=None),  # as where there is an accelerator
    ):
        yield


def _on_an_accelerator(own, *args):
    """Trainer's settings, after which Accelerate takes the processes for those of a device that it shards on."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    arguments = own(*args)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments
