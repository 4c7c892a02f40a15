"""A finished run repeated from its record: what differs before it begins, and whether the weights are the same after.

command = as_it_was(command)          # python train.py --reproduce outputs/smol
train(command)
is_equal(command)                     # True: the weights' hashes are equal
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.effects import NO_EFFECT, is_below
from config.loader import CommandLine
from config.model_schema import TRAIN
from config.schema import HubConfig, ModelConfig, RunConfig, SourceConfig, TrackingConfig
from src.data import known_digests, token_folder
from src.inputs import FILE as INPUTS
from src.inputs import ROOT, described, program_sha256
from src.run import CHANGES
from utils.digests import Digests
from utils.errors import UserError
from utils.json_text import read_json_file
from utils.launch import is_main_process, processes_started
from utils.logging import get_logger
from utils.reproducibility import environment
from utils.weights_digest import weights_sha256

log = get_logger(__name__)

ROUNDED = "sums may be taken in another order, and the weights be rounded otherwise"
OTHER_RESULT = "the run learns from something else, so that its weights differ"
EFFECTS = {
    "program_sha256": "any part of the run may be computed otherwise",
    "python": "little: nothing of a step is computed in Python",
    "device": ROUNDED,
    "threads": ROUNDED,
    "hardware": ROUNDED,
    "packages.torch": "new weights and dropout may be drawn otherwise, and sums be rounded otherwise",
    "packages.numpy": "rows may be drawn in another order",
    "packages.tokenizers": "texts may become other tokens",
    "packages.jinja2": "conversations may be written otherwise",
    "packages.datasets": "rows may be read otherwise",
    "packages": "a step may be computed otherwise",
}
"""What follows from a difference, by the dotted name in environment.json or the part that it begins with."""

TOLD = 20
"""Differences of two records that are told after the run, at most."""

NO_MATTER = ("hardware.cores",)


@dataclass(frozen=True)
class Original:
    """The run that is repeated, as its record has it."""

    path: Path
    environment: dict[str, Any]
    data: dict[str, Any]
    inputs: dict[str, Any] | None
    """None: the run is older than this part of the record."""
    weights_sha256: str
    forced: tuple[str, ...] = ()
    """Checks that did not stop it."""

    @classmethod
    def read(cls, path: Path) -> "Original":
        """
        Raises:
            UserError: a part of the record is missing or no JSON, or the run has no result.
        """
        machine, data, result = (_read(path / name) for name in ("environment.json", "data.json", "result.json"))
        inputs = _read(path / INPUTS) if (path / INPUTS).is_file() else None
        digest = result.get("weights_sha256") or weights_sha256(path / "model")
        if digest is None:
            raise UserError(
                f"{path / 'result.json'} has no weights_sha256, and {path / 'model'} no weights to take it from; there "
                "is nothing to compare with"
            )
        return cls(path, machine, data, inputs, digest, tuple(result.get("forced_checks", ())))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; only a run that has ended, with its whole record, can be repeated")
    return read_json_file(path, "bring it back", dict)


def as_it_was(command: CommandLine) -> CommandLine:
    """The command line of a run that repeats another: its threads and Hub commits, and neither push nor trackers.

    What differs from then is told, each with what it can change.

    Raises:
        UserError: the record does not suffice, or the run was launched otherwise.
    """
    original = Original.read(command.reproduce)
    _refuse_changed(original)
    _check_launch(original)
    config = _pinned(command.config, original)
    if is_main_process():
        for line in _differences(original, config):
            log.warning("%s", line)
        log.info("repeating %s, whose weights have the SHA-256 %s", original.path, original.weights_sha256)
    return replace(command, config=config, force=(*command.force, *original.forced))


def _refuse_changed(original: Original) -> None:
    """
    Raises:
        UserError: the run was resumed under other conditions than it started with, so that its record is of its end.
    """
    path = original.path / CHANGES
    changes = read_json_file(path, "bring it back", list) if path.is_file() else []
    told = [
        f"{change['name']} from {change['before']!r} to {change['after']!r} at step {change['step']}"
        for change in changes
        if not (change["file"] == "config.json" and is_below(change["name"], NO_EFFECT))
    ]
    if told:
        raise UserError(
            f"{original.path} cannot be repeated from its record, as it was resumed under other conditions than it "
            f"started with: {'; '.join(told)}. Start a run of its own with --config"
        )


def _check_launch(original: Original) -> None:
    """
    Raises:
        UserError: another number of processes is at work, whose global batches would be others.
    """
    processes = original.environment.get("world_size", 1)
    if processes != processes_started():
        start = f"accelerate launch --num_processes {processes} train.py" if processes > 1 else "python train.py"
        raise UserError(
            f"{original.path} ran in {processes} process(es), and this is {processes_started()}, which would train on "
            f"other batches; start it as `{start} --reproduce {original.path}`, with its file of config/accelerate"
        )


def _pinned(config: RunConfig, original: Original) -> RunConfig:
    """The configuration with what it left to the day and the machine set to what that was."""
    threads = original.environment.get("threads") if original.environment.get("device") == "cpu" else None
    data = {
        side: tuple(
            _pinned_source(source, account)
            for source, account in itertools.zip_longest(sources, (original.data.get(side) or {}).get("sources", []))
            if source is not None
        )
        for side, sources in (("train", config.data.train), ("eval", config.data.eval))
    }
    return replace(
        config,
        model=_pinned_model(config.model, original),
        data=replace(config.data, **data),
        training=replace(config.training, cpu_threads=config.training.cpu_threads or threads),
        hub=HubConfig(),
        tracking=TrackingConfig(),
    )


def _pinned_model(model: ModelConfig, original: Original) -> ModelConfig:
    commit = (original.inputs or {}).get("model.path", {}).get("commit")
    return replace(model, revision=commit) if commit else model


def _pinned_source(source: SourceConfig, account: dict[str, Any] | None) -> SourceConfig:
    revision = (account or {}).get("revision")
    return replace(source, revision=revision) if revision and len(revision) == 40 else source


def _differences(original: Original, config: RunConfig) -> Iterator[str]:
    """Each thing that is not as it was when the run began, with what it can change."""
    here = environment(ROOT) | {"program_sha256": program_sha256(ROOT)}
    known = original.environment
    if "program_sha256" not in known:
        yield f"the record is of an older program: {EFFECTS['program_sha256']}"
    before, now = _flat(known), _flat(here)
    for name in sorted(before.keys() & now.keys()):
        effect = next((EFFECTS[part] for part in _parts(name) if part in EFFECTS), None)
        pinned = name == "threads" and config.training.cpu_threads == before[name]
        if effect and before[name] != now[name] and not pinned and name not in NO_MATTER:
            yield f"{name} was {before[name]!r} and is {now[name]!r}: {effect}{_way_back(name, known)}"
    if here["device"] != "cpu":
        yield f"this is a {here['device']} device, on which sums of one run to the next may be rounded otherwise"
    if config.data.template_date is None:
        yield "data.template_date is the clock's: a template that writes it writes another day's"
    digests = known_digests(token_folder(config.data, config.output))
    yield from _other_data(original, digests)
    yield from _other_inputs(original, config, digests)
    digests.save_or_tell()


def _way_back(name: str, known: dict[str, Any]) -> str:
    commit, _, dirty = (known.get("git_commit") or "").partition("-")
    if name != "program_sha256" or not commit:
        return ""
    return f"; `git checkout {commit}` brings it back" + (", but for what was not committed then" if dirty else "")


def _other_data(original: Original, digests: Digests) -> Iterator[str]:
    for side in ("train", "eval"):
        for source in (original.data.get(side) or {}).get("sources", []):
            for path, digest in source["sha256"].items():
                effect = OTHER_RESULT if side == "train" else "other rows are measured on"
                yield from _other_file(Path(path), digest, digests, effect, original)


def _other_inputs(original: Original, config: RunConfig, digests: Digests) -> Iterator[str]:
    if original.inputs is None:
        yield f"{original.path / INPUTS} is missing: whether base and tokenizer are the same is not known"
        return
    for name, known in original.inputs.items():
        if name == "model.tokenizer" and config.model.tokenizer == TRAIN:
            continue  # the run made it, and will again
        revision = known["commit"]
        now = described(known["path"], digests, revision)["sha256"]
        for file, digest in known["sha256"].items():
            if file not in now:
                where = "has not been fetched" if revision else "is not there"
                yield f"{name}: {file} of {known['path']} {where}, with which the run began"
            elif now[file] != digest:
                yield f"{name}: {file} of {known['path']} holds other bytes than then: {OTHER_RESULT}"


def _other_file(path: Path, digest: str, digests: Digests, effect: str, original: Original) -> Iterator[str]:
    if not path.is_file():
        folder = original.environment.get("folder")
        away = f" (the run was started in {folder})" if not path.is_absolute() and folder != str(Path.cwd()) else ""
        yield f"{path} is not there{away}: {effect}"
    elif digests.sha256(path) != digest:
        yield f"{path} holds other bytes than then: {effect}"


def is_equal(command: CommandLine) -> bool:
    """Whether a repeated run came to the weights of the first; what is known of a difference is told.

    Raises:
        UserError: a part of a record is missing.
    """
    original = Original.read(command.reproduce)
    path = Path(command.config.output.folder) / command.config.output.name
    repeated = Original.read(path)
    if repeated.weights_sha256 == original.weights_sha256:
        log.info(
            "equal: the weights in %s have the SHA-256 %s, as those in %s", path, original.weights_sha256, original.path
        )
        return True
    log.error(
        "different: the weights in %s have the SHA-256 %s, and those in %s %s; %s",
        path,
        repeated.weights_sha256,
        original.path,
        original.weights_sha256,
        _first_other_step(original.path, path),
    )
    for line in itertools.islice(_other_records(original, repeated), TOLD):
        log.error("%s", line)
    return False


def _other_records(one: Original, other: Original) -> Iterator[str]:
    """What two runs' records of their data and inputs differ in; where a file stands does not matter."""
    for name in ("data", "inputs"):
        before, now = (_flat(getattr(run, name) or {}) for run in (one, other))
        for key in sorted(before.keys() & now.keys()):
            if before[key] != now[key] and not key.endswith(".path"):
                yield f"{name}.json: {key} was {before[key]!r} and is {now[key]!r}"


def _first_other_step(one: Path, other: Path) -> str:
    """From which step on two runs' losses part, in words."""
    losses = []
    for folder in (one, other):
        try:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses.append({line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line})
        except (OSError, ValueError) as error:
            return f"the losses in {folder / 'metrics.jsonl'} cannot be read ({error})"
    apart = [step for step in sorted(losses[0].keys() & losses[1].keys()) if losses[0][step] != losses[1][step]]
    return f"their losses differ from step {apart[0]} on" if apart else "their losses on record are the same"


def _parts(name: str) -> Iterator[str]:
    """A dotted name and the names of what it is in, from the longest."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The values of nested dicts and lists by dotted name."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {name: tree}
    return {key: value for part, below in items for key, value in _flat(below, f"{name}.{part}".lstrip(".")).items()}
