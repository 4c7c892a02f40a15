"""What is said of processes that are gone or silent, and how long the others wait, shown on real groups of two."""

import os
import time
from datetime import timedelta

import pytest
import torch

from tests.processes import start_processes
from utils.distributed import check_shared_folder
from utils.errors import UserError
from utils.peers import PatientGroup, lost_processes_told

STEP_S = 3.0
"""Seconds that a process waits for the other in a step here."""


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    (folder / f"there-{rank}").touch()
    while len(list(folder.glob("there-*"))) < 2:  # on a busy machine one starts long after the other
        time.sleep(0.02)
    address = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    share(rank, folder)
    lose(rank, folder)
    os._exit(0)  # the groups are broken on purpose: nobody takes leave


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with a file for each thing that two processes were told."""
    folder = tmp_path_factory.mktemp("peers")
    start_processes(one_of_two, folder)
    return folder


def reduce(group, note=None):
    try:
        torch.distributed.all_reduce(torch.zeros(2), group=group)
    except RuntimeError as error:
        if note:
            error.add_note(note)
        raise


def lose(rank, folder):
    patience, last = PatientGroup(), torch.distributed.new_group()
    torch.distributed.barrier()  # so that they connect to each other in a step's time
    steps = torch.distributed.new_group(timeout=timedelta(seconds=STEP_S))
    if rank == 0:
        silent = r"does not answer: it hangs, or the link .* is cut \(.*gloo.*imed out"
        with pytest.raises(UserError, match=silent), lost_processes_told(folder):
            reduce(steps)
        (folder / "checkpoint-7").mkdir()
    else:
        time.sleep(2.5 * STEP_S)
    patience.wait()  # the first process has been here for a while, and the second worked alone
    if rank == 1:
        os._exit(0)
    gone = r"has ended, or its machine has; .*in step 9; .*gloo.* is .*checkpoint-7; start"
    with pytest.raises(UserError, match=gone), lost_processes_told(folder):
        reduce(last, "in step 9")
    (folder / "told").touch()


def test_who_is_silent_and_who_is_gone_is_told_and_who_works_alone_is_waited_for(told):
    assert (told / "told").exists()


def share(rank, folder):
    device = torch.device("cpu")
    check_shared_folder(folder / "one" / "run", device)
    if rank == 0:
        assert list((folder / "one" / "run").iterdir()) == [], "the main process takes its mark away"
    check_shared_folder(folder / f"machine-{rank}" / "run", device)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    check_shared_folder(folder / "one" / "run", device)
    with pytest.raises(UserError, match=r"is not .*/run on every other, .*disk that the machines share"):
        check_shared_folder(folder / f"machine-{rank}" / "run", device)
    (folder / f"done-{rank}").touch()
    torch.distributed.barrier()


def test_sharded_checkpoints_are_refused_where_machines_share_no_folder(told):
    assert len(list(told.glob("done-*"))) == 2


def test_other_errors_keep_their_kind(tmp_path):
    for error in (RuntimeError("CUDA out of memory"), RuntimeError("gloo: op.preamble.length <= op.nbytes. 8 vs 4")):
        with pytest.raises(RuntimeError) as caught, lost_processes_told(tmp_path):
            raise error
        assert caught.value is error


def test_a_process_alone_waits_for_nobody(tmp_path):
    assert not torch.distributed.is_initialized()
    PatientGroup().wait()
    check_shared_folder(tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()
