"""What a run starts from beside its data, as its record has it: base, tokenizer, adapters, template, and the program.

    record_origins(run, config, own, cache_folder)      # environment.json, inputs.json
    program_sha256(ROOT)

A file is read for its hash once, about a second for each GB, and again only after it has changed: see `utils.digests`.
"""

import fnmatch
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from config.recipe import recipes_in
from config.schema import ModelConfig, RunConfig
from src.data import known_digests
from src.run import Run
from utils.digests import Digests
from utils.launch import is_main_process
from utils.reproducibility import environment

ROOT = Path(__file__).resolve().parent.parent
FILE = "inputs.json"

MATTERS = ("world_size", "packages", "program_sha256", "threads", "device", "cpu_instructions")
"""What of environment.json a run should go on with as it began."""

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
)
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", "beside.json", "*.py")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("*.bin", "*.bin.index.json")
"""Weights that are read where there are no others."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def record_origins(run: Run, config: RunConfig, own: ModelConfig, cache_folder: Path) -> None:
    """Write environment.json, and inputs.json: by the field that names it, each input with its files' SHA-256 and a Hub
    repository's commit; the main process alone does.

    Args:
        own: `config.model` with the tokenizer that this run may have made.
        cache_folder: where hashes of files are remembered.
    """
    if not is_main_process():
        return
    machine = environment(ROOT) | {"program_sha256": program_sha256(ROOT), "folder": str(Path.cwd())}
    started = run.before("environment.json").get("command", machine["command"])  # a resume's makes no run
    run.record("environment.json", machine | {"command": started}, matters=MATTERS)
    digests = known_digests(cache_folder)
    found = {name: described(path, digests, revision) for name, (path, revision) in _named(config, own).items()}
    digests.save_or_tell()
    run.record(FILE, found, matters=("sha256",))


def _named(config: RunConfig, own: ModelConfig) -> dict[str, tuple[str, str | None]]:
    """The path and revision of each input, by the field that names it."""
    named = {
        "model.path": (config.model.path, config.model.revision),
        "model.tokenizer": (own.tokenizer, config.model.revision if own.tokenizer == config.model.path else None),
        "model.chat_template": (config.model.chat_template, None),
        "adapter.path": (config.adapter.path, None),
    }
    named |= {f"adapter.beside.{index}": (path, None) for index, path in enumerate(config.adapter.beside)}
    return {name: (path, revision) for name, (path, revision) in named.items() if path is not None}


def described(path: str, digests: Digests, revision: str | None = None) -> dict[str, Any]:
    """An input's path, its Hub commit if it is of the Hub, and the SHA-256 of each file that is read of it, by name.

    A template's name, such as `chatml`, is no file and has none.
    """
    place = Path(path)
    if place.is_file():
        return {"path": path, "commit": None, "sha256": {place.name: digests.sha256(place)}}
    folder = place if place.is_dir() else _snapshot(path, revision)
    if folder is None:
        return {"path": path, "commit": None, "sha256": {}}
    commit = folder.name if folder is not place and _COMMIT.fullmatch(folder.name) else None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    patterns = (*TOKENIZER, *SETTINGS, *WEIGHTS)
    if not any(file.suffix == ".safetensors" for file in files):
        patterns += PICKLES
    read = [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)]
    return {"path": path, "commit": commit, "sha256": {file.name: digests.sha256(file) for file in read}}


def _snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a Hub repository's files in the local cache, from which this run has read them."""
    if repo_id.count("/") > 1:
        return None
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"):
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def weight_digests(record: Mapping[str, Any]) -> dict[str, str]:
    """Of an input's record, the SHA-256 of the files with weights."""
    return {
        name: digest for name, digest in record.get("sha256", {}).items() if name.endswith((".safetensors", ".bin"))
    }


def program_sha256(root: Path) -> str:
    """The SHA-256 of the program's own code below `root`, recipes left out: those say what a run is, and stand in its
    config.json."""
    recipes = set(recipes_in(root / "config"))
    files = [root / "train.py", *(file for part in ("config", "src", "utils") for file in (root / part).rglob("*.py"))]
    digest = hashlib.sha256()
    for file in sorted(set(files) - recipes):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
