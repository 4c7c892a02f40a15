"""What a run will cost, measured in a process of its own: what kills it ends neither the plan nor the machine.

    costs = measure_costs(config, Path("train.py"))       # every process of the run together
    print("\\n".join(costs.lines()))
    write_json(run / "plan.json", {"costs": costs.to_dict()})

Of a run of several processes, each starts one, and these find each other as those of the run do. They write to a hidden
folder beside the run's, so that the disk is that of the run, and the folder goes with them.
"""

import contextlib
import functools
import gc
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import yaml

from config.recipe import YamlDumper
from config.schema import RunConfig
from config.validation import to_tree
from src.costs import Costs
from src.proposals import Outcome, propose
from src.trial import LOCK, TrialFiles
from src.trial_parts import Part
from utils.launch import process_rank
from utils.locks import Lock
from utils.logging import get_logger
from utils.memory import available_bytes, resident_bytes
from utils.peers import PatientGroup
from utils.redaction import redact

log = get_logger(__name__)

TIMEOUT_S = 3600.0
"""Seconds that a trial may take, of which a model's loading may be many."""

STALL_S = 120.0
"""Seconds without any work of a processor, in any process, after which a trial is ended. Python waits for ever for a
thread that had no memory to begin with."""

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

_AGENT = ("TORCHELASTIC_",)
"""The same of those by which `torchrun` has processes meet at a place of its own."""


def measure_costs(config: RunConfig, entry: Path, *, timeout_s: float = TIMEOUT_S) -> Costs:
    """Try a run, and where it does not fit, what would; nothing of the run itself is touched.

    Every process of the run calls this together, while they are a group, and all get the same. A model that they hold
    counts as free memory on the host, as it will be gone when the run starts. On a GPU it does not: drop it before.

    Args:
        config: that of the run.
        entry: the program that the run is started by, `train.py`.
        timeout_s: of each trial.
    """
    measure = functools.partial(_measure, entry=entry, timeout_s=timeout_s, peers=PatientGroup())
    costs = measure(config)
    if costs.fits is not False:
        return costs
    log.info("the run does not fit (%s); trying what would", costs.reason or "it needs more than is available")
    return replace(costs, tried=propose(config, measure))


def _measure(config: RunConfig, *, entry: Path, timeout_s: float, peers: PatientGroup) -> Costs:
    """One trial."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    available, held = available_bytes(), resident_bytes("RssAnon") or 0
    with _folder(Path(config.output.folder), peers) as folder:
        files = TrialFiles(folder, process_rank())
        outcome, reason = _run(config, entry, files, timeout_s, peers)
        report = json.loads(files.report.read_text(encoding="utf-8")) if files.report.is_file() else {}
        parts = peers.shared(Part(outcome, reason, report, socket.gethostname(), available, held))
    return Costs.of_parts(parts, config)


@contextlib.contextmanager
def _folder(parent: Path, peers: PatientGroup) -> Iterator[Path]:
    """A hidden folder below `parent`, of one name for all processes; both are as before when the block ends. What a
    killed plan has left is removed too."""
    made = next((folder for folder in [*reversed(parent.parents), parent] if not folder.exists()), None)
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{PREFIX}*"):
        if (old / LOCK).is_file() and (lock := Lock.take(old / LOCK)):
            with lock:
                shutil.rmtree(old, ignore_errors=True)
    folder = parent / peers.shared(f"{PREFIX}{secrets.token_hex(4)}")[0]
    folder.mkdir(exist_ok=True)  # on another machine it may be another disk's
    try:
        with Lock.take(folder / LOCK) or contextlib.nullcontext():
            peers.wait()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made is not None:
            with contextlib.suppress(OSError):  # not empty: the run's data was prepared there
                for empty in [parent, *parent.parents][: len(parent.parts) - len(made.parts) + 1]:
                    empty.rmdir()


def _run(
    config: RunConfig, entry: Path, files: TrialFiles, timeout_s: float, peers: PatientGroup
) -> tuple[Outcome | None, str]:
    """Run a trial to its end; how this process's part ended, and why it did not end well."""
    files.recipe.touch(mode=0o600)  # URLs in it may hold what opens them
    files.recipe.write_text(yaml.dump(to_tree(config), Dumper=YamlDumper, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(entry), "--config", str(files.recipe), "--trial", str(files.folder)]
    environment = _environment(peers)
    with open(files.log, "wb") as said:
        # The pipe is never written to: it closes when this process ends, however it does, and then the trial ends too.
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment)
        try:
            limit = _watch(child, timeout_s, peers)
            unfinished = child.poll() is None and not limit
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
    if unfinished:
        return None, ""
    return _ending(child.returncode, limit, files.log.read_text(encoding="utf-8", errors="replace"))


def _environment(peers: PatientGroup) -> dict[str, str]:
    """The variables of a trial's process: alone as if no launcher had started it, or with a place to meet the others
    that is not the run's."""
    with socket.socket() as free:
        free.bind(("", 0))
        ports = peers.shared(free.getsockname()[1])
    left_out = _LAUNCHERS if len(ports) == 1 else _AGENT
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept if len(ports) == 1 else kept | {"MASTER_PORT": str(ports[0])}


def _watch(child: subprocess.Popen[bytes], timeout_s: float, peers: PatientGroup) -> str:
    """Wait for a trial to end, in all processes or badly in one; or say which limit it is over as it runs."""
    began = last = time.monotonic()
    worked = 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_S)
        now, work = time.monotonic(), _processor_s(child.pid)
        if work != worked:
            last, worked = now, work
        states = peers.shared((child.poll(), now - last, now - began))
        running = [idle_s for code, idle_s, _ in states if code is None]
        if not running or any(code for code, _, _ in states):
            return ""
        if min(running) > STALL_S:
            return f"it did nothing for {STALL_S:,.0f} s"
        if max(spent_s for *_, spent_s in states) > timeout_s:
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
