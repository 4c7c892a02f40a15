"""What the processes of a trial have measured, each its own part, put together.

parts = [Part("measured", "", report, machine="one", available=2**34, held=2**29), ...]   # by rank
outcome, reason = ending(parts)
report = joined_report(parts)           # as one process writes it, with the most that any needed
peaks_by_process(parts)                 # ({"resident": 2**30, "cuda": 2**36}, ...)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.proposals import Outcome

DEVICES = ("resident", "cuda")
"""Where memory is taken: the host, a GPU."""

_MOST = ("seconds", "resident_bytes", "cuda_bytes", "cuda_reserved_bytes")

_FOLLOWS = "another process of this run"
"""What a process says that has only lost another (`utils.peers`)."""


@dataclass(frozen=True)
class Part:
    """What one process found."""

    outcome: Outcome | None
    """None: it was ended, as another did not come to its end."""

    reason: str
    """Why it is not measured; empty if it is."""

    report: dict[str, Any]
    """What it wrote, be it to its end or not."""

    machine: str
    available: int | None
    """Bytes of memory that its machine had for it; None where that is not known."""

    held: int = 0
    """Bytes that the plan's own process took meanwhile, which is gone when the run starts."""


@dataclass(frozen=True)
class Room:
    """Host memory of one machine, in bytes."""

    needed: int
    """By all processes of the run there; pages of prepared data, which the system drops when it must, left out."""

    available: int | None

    @property
    def share(self) -> float:
        """Part of what is available that is needed; 0 where that is not known."""
        return 0.0 if self.available is None else self.needed / max(1, self.available)


def ending(parts: Sequence[Part]) -> tuple[Outcome, str]:
    """How a trial ended, and why it did not end well: what came first, as far as that can be told."""
    bad = [part for part in parts if part.outcome not in ("measured", None)]
    if not bad:
        return "measured", ""
    first = min(bad, key=lambda part: (part.outcome != "out of memory", _FOLLOWS in part.reason))
    return first.outcome, first.reason


def joined_report(parts: Sequence[Part]) -> dict[str, Any]:
    """The first process's report with each phase's longest time and highest peak of all, and the mean of their tokens
    in ordinary steps, as the processes wait for each other in each."""
    reports = [part.report for part in parts]
    found = dict(reports[0])
    found["phases"] = [
        _most([phase for phase in same if phase])
        for same in itertools.zip_longest(*(report.get("phases", ()) for report in reports))
    ]
    tokens = [report["ordinary_tokens"] for report in reports if "ordinary_tokens" in report]
    if tokens:
        found["ordinary_tokens"] = [sum(step) / len(step) for step in zip(*tokens, strict=True)]
    if available := [report["cuda_available_bytes"] for report in reports if "cuda_available_bytes" in report]:
        found["cuda_available_bytes"] = min(available)
    return found


def _most(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One phase of several processes, of which the first that came so far tells the rest."""
    return phases[0] | {name: max(one[name] for one in phases) for name in _MOST if all(name in one for one in phases)}


def peaks_by_process(parts: Sequence[Part]) -> tuple[dict[str, int], ...]:
    """Most bytes of each process in any phase, by device, of `DEVICES`."""
    return tuple(
        {
            device: max(sizes)
            for device in DEVICES
            if (sizes := [phase[f"{device}_bytes"] for phase in phases if f"{device}_bytes" in phase])
        }
        for phases in (part.report.get("phases", ()) for part in parts)
    )


def tightest_machine(parts: Sequence[Part]) -> Room:
    """The host memory of the machine that has least left."""
    rooms = []
    for machine in {part.machine for part in parts}:
        there = [part for part in parts if part.machine == machine]
        needed = [
            peaks.get("resident", 0) - part.report.get("mapped_bytes", 0)
            for part, peaks in zip(there, peaks_by_process(there), strict=True)
        ]
        known = [part.available for part in there if part.available is not None]
        rooms.append(Room(sum(needed), min(known) + sum(part.held for part in there) if known else None))
    return max(rooms, key=lambda room: room.share)
