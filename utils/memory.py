"""How much memory this process takes at most, how much there is, and an allocator that takes as much each time.

    fix_allocator()                  # first of all, as it holds for what is allocated from then on
    restart_peak()
    ...
    resident_peak_bytes()            # since then
    available_bytes()                # what the machine and its control groups leave

Torch is imported nowhere here, so that a program can begin with `fix_allocator`.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the settings (malloc.h)."""

MMAP_BYTES = 2**25
"""Blocks from this size on are mapped one by one, and go back to the system when they are freed. It is the most that
glibc takes, and where its own moving threshold ends up in training. A lower one costs speed, as the system clears every
page of a block each time that it is mapped."""

TRIM_BYTES = 2**26
"""Free memory at the heap's end from which it goes back to the system: twice as much, as glibc itself has it."""

_NO_LIMIT = 2**60  # control groups without a limit tell a number near 2**63, in whole pages


def fix_allocator() -> bool:
    """Fix the thresholds that glibc's malloc otherwise moves with what was freed before, so that two processes that do
    the same work take the same memory for it.

    Returns:
        Whether it was done: other C libraries have no such setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, TRIM_BYTES))


def resident_bytes(name: str = "VmHWM") -> int | None:
    """A figure of this process's resident memory as Linux tells it in /proc/self/status; None elsewhere.

    Args:
        name: `VmHWM`, the most so far; `RssAnon`, what is no file's at present; `RssFile`, pages of mapped files.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith(f"{name}:")), None)


def resident_peak_bytes() -> int:
    """The most resident memory of this process, since it began or its peak was started anew. Linux's getrusage would
    begin with that of the process that started this one (signal->maxrss outlives exec), so there the kernel's own
    account of it is read."""
    found = resident_bytes()
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart_peak() -> bool:
    """Have the most resident memory counted from now on; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory that this process could still take before the machine or one of its control groups has none left; None
    where the system does not tell. Files that the system keeps in memory count as free, since it lets go of them."""
    found = [*_machine_bytes(Path("/proc/meminfo")), *_group_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return max(0, min(found)) if found else None


def _machine_bytes(meminfo: Path) -> Iterator[int]:
    """What /proc/meminfo tells to be available."""
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 2**10


def _group_bytes(membership: Path, root: Path) -> Iterator[int]:
    """What each control group around this process leaves, of either version.

    Args:
        membership: lines of `number:controllers:path`, as /proc/self/cgroup has them.
        root: where the groups are mounted.
    Source: docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
    """
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops, names = (root, root / "unified"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            tops, names = (root / "memory",), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for top in tops:
            inner = top / path.lstrip("/")
            # Within a container the path may be that of the host, and only the mount's top is there.
            groups = [inner, *inner.parents] if inner.is_dir() else [top]
            for group in groups:
                if group.is_relative_to(top):
                    yield from _room(group, *names)


def _room(group: Path, limit_name: str, used_name: str) -> Iterator[int]:
    try:
        limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in (limit_name, used_name))
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        yield int(limit) - int(used) + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return  # a group without the controller has no such files


def be_killed_first() -> None:
    """Have the system end this process before others, if memory runs out."""
    if os.path.exists("/proc/self/oom_score_adj"):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
