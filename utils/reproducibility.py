"""What a run ran on: versions, hardware, commit.

write_json(run / "environment.json", environment())
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from utils.distributed import accelerator_name, shards_weights
from utils.launch import processes_started

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
    "jinja2",
)


def environment(repository: Path) -> dict[str, Any]:
    """Versions, hardware, the repository's commit and the command, as plain JSON; nothing of the user's environment.

    Args:
        repository: the folder whose git commit is recorded; null where there is none.
    """
    return {
        **versions(),
        "hardware": _hardware(),
        "git_commit": _commit(repository),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "world_size": processes_started(),
        "shards_weights": shards_weights(),
        "device": accelerator_name(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, Any]:
    """Python's version, and under `packages` those that a run stands on, null where one is not installed."""
    return {"python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        hardware["cuda"] = torch.version.cuda
    return hardware


def _commit(repository: Path) -> str | None:
    """The commit that is checked out, with `-dirty` behind it where tracked files differ from it."""
    command = ["git", "-C", str(repository), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
