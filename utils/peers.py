"""Processes that wait for each other, and what is said when one does not come.

patience = PatientGroup()          # in all processes
patience.wait()                    # for one that works alone for long
patience.shared("by each")         # ["by each", ...], by rank
with lost_processes_told(run):     # what a user is told of a killed machine, a cut link
    ...
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from utils.checkpointing import last_checkpoint
from utils.errors import UserError, in_one_line

STEP_TIMEOUT_S = 600
"""Seconds that a process waits for the others in a step. What the processes do between two waits takes seconds, an
evaluation's rows or a shard's file at most minutes. A link that is cut shows by nothing but this time, so a run hangs
for as long. It is torch's own for NCCL, and a third of what transformers gives all devices."""

PATIENCE_S = 24 * 3600
"""The same where one may prepare data, read a model or hash a checkpoint that the others have no part in."""

_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")
_SILENT = ("timed out", "timeout", "network error")
_APART = ("connectfullmesh failed",)


class PatientGroup:
    """All processes of a run once more, in a group of its own on the host, with a longer timeout."""

    def __init__(self) -> None:
        """Every process makes one together; with a single process it does nothing."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        several = several and torch.distributed.get_world_size() > 1
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_S)) if several else None
        )

    def wait(self) -> None:
        """Until all processes are here."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)

    def shared(self, value: Any) -> list[Any]:
        """What each process has given, by rank; all of them call this together.

        Args:
            value: anything that pickles.
        """
        if self._group is None:
            return [value]
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found


@contextlib.contextmanager
def lost_processes_told(run: Path) -> Iterator[None]:
    """Turn the error of a process whose peers are gone, or cannot be reached, into one that its user can act on.

    Args:
        run: the run's directory, of which the last checkpoint is named.
    Raises:
        UserError: such an error came out of the block, whose own text it repeats.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own, and torch's others are kinds of this one
        happened = _what_happened(error)
        if happened is None:
            raise
        raise UserError(f"{happened} ({_said(error)}). {_way_on(run)}") from error


def _what_happened(error: RuntimeError) -> str | None:
    """Why a collective failed, in words; None if it was not for want of another process."""
    text = str(error).lower()
    if not (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        return None
    if any(sign in text for sign in _APART):
        return (
            "the processes of this run cannot connect to each other, which they do at the address that each machine's "
            "own name stands for; name the network interface between them in GLOO_SOCKET_IFNAME, and for GPUs in "
            "NCCL_SOCKET_IFNAME, on each machine"
        )
    if any(sign in text for sign in _GONE):
        return "another process of this run has ended, or its machine has; what it met stands in its own output"
    if any(sign in text for sign in _SILENT):
        return "another process of this run does not answer: it hangs, or the link to its machine is cut"
    return None


def _said(error: RuntimeError) -> str:
    """Where it was and the library's own words."""
    return "; ".join([*getattr(error, "__notes__", ()), in_one_line(error)])


def _way_on(run: Path) -> str:
    last = last_checkpoint(run)
    if last is None:
        return f"There is no complete checkpoint in {run} on this machine; where there is one, go on with --resume"
    return f"The last complete checkpoint is {last}; start all processes again with --resume to go on from it"
