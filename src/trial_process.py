"""What a run will cost, measured in a process of its own: what kills it ends neither the plan nor the machine.

    costs = measure_costs(config, Path("train.py"))
    print("\\n".join(costs.lines()))
    write_json(run / "plan.json", {"costs": costs.to_dict()})

The process is one, whatever the run has: of a run of several it measures the share of one, with its micro-batches. It
writes to a hidden folder beside the run's, so that the disk is that of the run, and the folder goes with it.
"""

import contextlib
import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from config.recipe import YamlDumper
from config.schema import RunConfig
from config.validation import to_tree
from src.costs import Costs
from src.proposals import Outcome, propose
from src.trial import LOCK, LOG, RECIPE, REPORT
from utils.distributed import shards_weights
from utils.launch import processes_here, processes_started
from utils.locks import Lock
from utils.logging import get_logger
from utils.memory import available_bytes, resident_bytes
from utils.redaction import redact

log = get_logger(__name__)

TIMEOUT_S = 3600.0
"""Seconds that a trial may take, of which a model's loading may be many."""

STALL_S = 120.0
"""Seconds without any work of a processor after which a trial is ended. Python waits for ever for a thread that had no
memory to begin with."""

LOOK_S = 1.0
"""Seconds between two looks at that."""

PREFIX = ".trial-"

_OUT_OF_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory|Cannot allocate memory|bad_alloc"
)
"""What Python, torch, CUDA, the system and C++ say."""

_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "PMI_",
    "OMPI_",
    "MV2_",
)
"""How the names of variables begin by which a launcher tells a process of the others."""


def measure_costs(config: RunConfig, entry: Path, *, timeout_s: float = TIMEOUT_S) -> Costs:
    """Try a run, and where it does not fit, what would; nothing of the run itself is touched.

    A model that this process holds counts as free memory on the host, as it will be gone when the run starts. On a GPU
    it does not: drop it before.

    Args:
        config: that of the run.
        entry: the program that the run is started by, `train.py`.
        timeout_s: of each trial.
    """
    if shards_weights():
        return Costs(
            "not measured",
            "FSDP and DeepSpeed give each process a part of every matrix, and a trial of one process would hold them "
            "all; start the run itself with training.max_steps=3, and read peak_memory in its result.json",
        )
    measure = functools.partial(_measure, entry=entry, timeout_s=timeout_s)
    costs = measure(config)
    if costs.fits is not False:
        return costs
    log.info("the run does not fit (%s); trying what would", costs.reason or "it needs more than is available")
    return replace(costs, tried=propose(config, measure))


def _measure(config: RunConfig, *, entry: Path, timeout_s: float) -> Costs:
    """One trial."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    there = available_bytes()
    available = {} if there is None else {"resident": there + (resident_bytes("RssAnon") or 0)}
    with _folder(Path(config.output.folder)) as folder:
        outcome, reason = _run(config, entry, folder, timeout_s)
        report = _report(folder)
    return Costs.of_report(
        report,
        config,
        outcome=outcome,
        reason=reason,
        available=available,
        processes=processes_started(),
        processes_here=processes_here(),
    )


@contextlib.contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """A hidden folder below `parent`, both of which are as before when the block ends. What a killed plan has left is
    removed too."""
    made = next((folder for folder in [*reversed(parent.parents), parent] if not folder.exists()), None)
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{PREFIX}*"):
        if (old / LOCK).is_file() and (lock := Lock.take(old / LOCK)):
            with lock:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with Lock.take(folder / LOCK) or contextlib.nullcontext():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made is not None:
            with contextlib.suppress(OSError):  # not empty: the run's data was prepared there
                for empty in [parent, *parent.parents][: len(parent.parts) - len(made.parts) + 1]:
                    empty.rmdir()


def _run(config: RunConfig, entry: Path, folder: Path, timeout_s: float) -> tuple[Outcome, str]:
    """Run a trial to its end; how it ended, and why it did not end well."""
    recipe = folder / RECIPE
    recipe.touch(mode=0o600)  # URLs in it may hold what opens them
    recipe.write_text(yaml.dump(to_tree(config), Dumper=YamlDumper, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(entry), "--config", str(recipe), "--trial", str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    with open(folder / LOG, "wb") as said:
        # The pipe is never written to: it closes when this process ends, however it does, and then the trial ends too.
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment)
        try:
            limit = _watch(child, timeout_s)
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
    return _ending(child.returncode, limit, (folder / LOG).read_text(encoding="utf-8", errors="replace"))


def _watch(child: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Wait for a trial to end; or say, while it still runs, which limit it is over."""
    began = last = time.monotonic()
    worked = 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_S)
            return ""
        now, work = time.monotonic(), _processor_s(child.pid)
        if work != worked:
            last, worked = now, work
        if now - last > STALL_S:
            return f"it did nothing for {STALL_S:,.0f} s"
        if now - began > timeout_s:
            return f"it took longer than {timeout_s:,.0f} s"


def _processor_s(pid: int) -> float:
    """Seconds of processors that a process and those it started have had; 0 once it has ended."""
    try:
        process = psutil.Process(pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(one.user + one.system for one in times)


def _ending(code: int, limit: str, said: str) -> tuple[Outcome, str]:
    """How a trial ended.

    Args:
        limit: that it was ended at; empty if it ended by itself.
        said: its log.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code == 0:
        return "measured", ""
    if short := [line for line in lines if _OUT_OF_MEMORY.search(line)]:
        return "out of memory", redact(short[-1])[:200]
    if limit:
        return "failed", limit
    if code == -signal.SIGKILL:
        return "out of memory", "the trial was killed (SIGKILL), as the system does where memory runs out"
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "failed", f"{redact(lines[-1].removeprefix('error: '))} ({ended})" if lines else ended


def _report(folder: Path) -> dict[str, Any]:
    """What the trial has measured; nothing if it did not come so far."""
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
