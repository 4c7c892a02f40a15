"""What to change of a run that does not fit into memory, found by trying it.

    for tried in propose(config, measure):
        tried.options                    # "--training.micro_batch_rows 1 --training.accumulation_steps 8"
        tried.fits                       # True of the last, if anything fits

Changes come in the order of what they cost, each on top of those before: smaller micro-batches of the same global
batch, activations that are computed again, activations that wait on the host, an optimizer of 8 bits, a base of 4 bits.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from config.constraints import ConfigError, check_constraints
from config.schema import FreezeConfig, OptimConfig, RunConfig
from config.validation import flatten, to_tree
from utils.distributed import accelerator_name
from utils.logging import get_logger

if TYPE_CHECKING:  # which imports this module
    from src.costs import Costs

log = get_logger(__name__)

Outcome = Literal["measured", "out of memory", "failed"]
"""How a trial ended."""

EIGHT_BIT = {OptimConfig().name: "adamw_8bit", "adamw_torch": "adamw_8bit", "lion_32bit": "lion_8bit"}
"""Optimizers of 8 bits in place of others."""

TOKENS_NOTE = "the global batch is about the same: how many rows a step has depends on their lengths"
QLORA_NOTE = "the frozen weights are rounded to 4 bits, which changes what is learned a little"
ADAPTER_NOTE = "an adapter trains in place of all weights, which changes what is learned"


@dataclass(frozen=True)
class Tried:
    """A change of the settings that was tried where the run does not fit."""

    options: str
    """As the command line takes them."""

    note: str
    """What else it changes; empty: nothing that is learned."""

    outcome: Outcome
    fits: bool
    peak_mib: dict[str, int]
    """By device; empty where the trial did not come to an end."""

    reason: str
    step_s: float | None


@dataclass(frozen=True)
class Candidate:
    """Settings that need less memory, and what else they change."""

    config: RunConfig
    note: str = ""


def propose(config: RunConfig, measure: "Callable[[RunConfig], Costs]") -> tuple[Tried, ...]:
    """Try what would fit, until something does.

    Args:
        config: settings that do not fit.
        measure: runs a trial.
    Returns:
        All that was tried, in order.
    """
    tried: list[Tried] = []
    for candidate in candidates(config, device=accelerator_name()):
        costs, options = measure(candidate.config), options_of(config, candidate.config)
        step_s = costs.projection.step_s if costs.projection else None
        peaks = {name: round(peak / 2**20) for name, peak in costs.peaks.items()} if costs.projection else {}
        tried.append(Tried(options, candidate.note, costs.outcome, bool(costs.fits), peaks, costs.reason, step_s))
        log.info("tried %s: %s", options, "it fits" if costs.fits else costs.reason or "it needs more than there is")
        if costs.fits:
            break
    return tuple(tried)


def candidates(config: RunConfig, *, device: str) -> Iterator[Candidate]:
    """Settings that need ever less memory; those that exclude each other are left out.

    Args:
        device: type of the device that trains.
    """
    smallest, note = config, ""
    for smaller in _smaller_micro_batches(config):
        if _allowed(smaller):
            smallest, note = smaller, "" if config.training.tokens_per_micro_batch is None else TOKENS_NOTE
            yield Candidate(smaller, note)
    current = Candidate(smallest, note)
    for step in (_selective, _full, _offload, _eight_bit, _four_bit):
        following = step(current, device)
        if following is not None and _allowed(following.config):
            current = following
            yield current


def _smaller_micro_batches(config: RunConfig) -> Iterator[RunConfig]:
    """Micro-batches of a half, a quarter ... of the rows or tokens, or the next that leaves the global batch whole."""
    training = config.training
    tokens = training.tokens_per_micro_batch
    rows, parts = training.micro_batch_rows, 1
    while True:
        parts *= 2
        if tokens is not None:
            if tokens // parts < config.data.max_length:
                return
            smaller: dict[str, Any] = {"tokens_per_micro_batch": tokens // parts}
        else:
            parts = next((number for number in range(parts, rows + 1) if rows % number == 0), 0)
            if not parts:
                return
            smaller = {"micro_batch_rows": rows // parts}
        smaller["accumulation_steps"] = training.accumulation_steps * parts
        yield replace(config, training=replace(training, **smaller))


def _training(before: Candidate, **changes: Any) -> Candidate:
    return replace(before, config=replace(before.config, training=replace(before.config.training, **changes)))


def _selective(before: Candidate, device: str) -> Candidate | None:
    training = before.config.training
    if training.gradient_checkpointing != "none" or training.activation_offload:
        return None
    return _training(before, gradient_checkpointing="selective")


def _full(before: Candidate, device: str) -> Candidate | None:
    if before.config.training.gradient_checkpointing == "full":
        return None
    return _training(before, gradient_checkpointing="full")


def _offload(before: Candidate, device: str) -> Candidate | None:
    if device != "cuda" or before.config.training.activation_offload:
        return None
    return _training(before, activation_offload=True)


def _eight_bit(before: Candidate, device: str) -> Candidate | None:
    name = EIGHT_BIT.get(before.config.optim.name)
    if device != "cuda" or name is None or importlib.util.find_spec("bitsandbytes") is None:
        return None
    return replace(before, config=replace(before.config, optim=replace(before.config.optim, name=name)))


def _four_bit(before: Candidate, device: str) -> Candidate | None:
    """A base of 4 bits under an adapter; of a checkpoint that is to train whole, with an adapter in its place."""
    config = before.config
    model, adapter = config.model, config.adapter
    if model.path is None or model.quantization != "none" or importlib.util.find_spec("bitsandbytes") is None:
        return None
    notes = [before.note, QLORA_NOTE]
    if adapter.kind == "none":
        if config.freeze != FreezeConfig():
            return None
        adapter, notes = replace(adapter, kind="lora"), [before.note, ADAPTER_NOTE, QLORA_NOTE]
    following = replace(config, model=replace(model, quantization="nf4"), adapter=adapter)
    return Candidate(following, "; ".join(note for note in notes if note))


def _allowed(config: RunConfig) -> bool:
    try:
        check_constraints(config)
    except ConfigError:
        return False
    return True


def options_of(config: RunConfig, other: RunConfig) -> str:
    """The options of the command line that make one configuration another."""
    before, after = flatten(to_tree(config)), flatten(to_tree(other))
    return " ".join(f"--{name} {value}" for name, value in after.items() if before.get(name) != value)
