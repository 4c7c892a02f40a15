"""A task of the training benchmark in a process of its own, within limits of time and memory.

result = run_worker(folder, {"name": "smolfactory", "case": asdict(case), "attention": "sdpa"}, timeout_s=90)
if over_limit(result):
    ...
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_S = 0.1
"""Seconds between two looks at the memory of a process."""

LATE, LARGE = "not done after", "takes more memory than"
"""How the `error` of a task begins that was ended at a limit."""


def over_limit(result: dict[str, Any]) -> bool:
    """Whether a task was ended, or not begun, because of a limit; it did not fail by itself."""
    return result.get("error", "").startswith((LATE, LARGE))


def run_worker(
    folder: Path, task: dict[str, Any], *, timeout_s: float, memory_gib: float | None = None
) -> dict[str, Any]:
    """What a task returns from a process of its own, or `error` with what ended it.

    Args:
        folder: holds the case and its rows.
        task: `name`, and what else the task needs.
        memory_gib: most resident memory of the process; None: no limit.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        task = task | {"folder": name, "started": time.time()}
        command = [
            sys.executable,
            str(ROOT / "scripts/benchmark.py"),
            "step",
            "--worker",
            str(folder),
            json.dumps(task),
        ]
        with open(Path(name) / "errors.txt", "w+", encoding="utf-8") as errors:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            try:
                ended = _watch(child, timeout_s, memory_gib)
            finally:
                child.kill()
                child.wait()
            errors.seek(0)
            said = errors.read()
        result = Path(name) / "result.json"
        if ended:
            return {"error": ended}
        if child.returncode == 0 and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        error = lines[-1].replace(str(ROOT), ".").replace(name, "TEMPORARY") if lines else "no message"
        reason = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        print(said[-4000:], file=sys.stderr)
        return {"error": f"{error[:300]} ({reason})"}


def _watch(child: subprocess.Popen, timeout_s: float, memory_gib: float | None) -> str:
    """Wait for the end of a process; or say which limit it is over, while it still runs."""
    deadline = time.monotonic() + timeout_s
    while child.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return f"{LATE} {timeout_s:g} s"
        if memory_gib is not None and _resident_gib(child.pid) > memory_gib:
            return f"{LARGE} {memory_gib:g} GiB"
        try:
            child.wait(timeout=min(left, SAMPLE_S))
        except subprocess.TimeoutExpired:
            continue
    return ""


def _resident_gib(pid: int) -> float:
    """Resident memory of a process; 0 once it has ended."""
    try:
        return psutil.Process(pid).memory_info().rss / 2**30
    except psutil.NoSuchProcess:
        return 0.0
