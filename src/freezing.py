"""Which of a model's own weights train, where no adapter does: norms, the last layers, patterns of names.

    freeze_weights(model, config.freeze, config.optim)

The backward pass ends at the lowest layer that trains, so that freezing from below spares time too. A weight that two
modules share, such as a head tied to the embeddings, trains or not as one, and goes by either name in patterns.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from config.schema import FreezeConfig, OptimConfig
from src.compilation import decoder_layers
from src.optim import MUON
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

KINDS = ("embeddings", "attention", "MLP", "norms", "head", "other")
"""Kinds of weights, in the order of the table. A head that is tied to the embeddings counts as embeddings."""

_SETS = {
    "norms": ("norms",),
    "all_but_embeddings": tuple(kind for kind in KINDS if kind not in ("embeddings", "head")),
}
"""Kinds that a word of `freeze.train` stands for."""

_KINDS_BY_NAME = {
    "attention": ("attn", "attention", "mixer"),
    "MLP": ("mlp", "ffn", "feed_forward", "feedforward", "expert", "moe"),
}

_MOMENTS = {
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_torch_npu_fused", "adamw_torch_xla", "stable_adamw"), 2
    ),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "adagrad"), 1),
    "paged_adamw_32bit": 2,
    "sgd": 0,
}
"""Numbers that an optimizer keeps for each that it trains."""

_FOUR_BYTE_STATE = ("paged_adamw_32bit", "lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit")
"""Optimizers of bitsandbytes whose state is float32 whatever the weight is."""

_MOMENTS_8BIT = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1),
}
"""Numbers of one byte that an optimizer of bitsandbytes keeps, with a float32 scale for each 256 of them."""

_LEAST_8BIT = 4096
"""Numbers in a tensor from which such an optimizer keeps its state in 8 bits; below, and for embeddings, in float32."""


def freeze_weights(model: PreTrainedModel, config: FreezeConfig, optim: OptimConfig) -> None:
    """Have only those weights train that the config names, and say in the log what they are and what that saves.

    Args:
        optim: tells the optimizer, whose state frozen weights do not need.
    Raises:
        UserError: a pattern matches no parameter, there are not so many layers, or nothing would train.
    """
    if config == FreezeConfig():
        return
    trained = weights_to_train(model, config)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
    # To recompute activations, transformers has the embeddings' output ask for a gradient, which only reentrant
    # checkpoints need: the backward pass would go on below the first layer that has anything to train.
    model.disable_input_require_grads()
    for line in freeze_table(model, optim):
        log.info("%s", line)


def weights_to_train(model: PreTrainedModel, config: FreezeConfig) -> set[str]:
    """Names of the parameters that train, each under the first of its names.

    Args:
        model: may be on the meta device.
    Raises:
        UserError: as `freeze_weights`.
    """
    kinds = kinds_of_weights(model)
    first_names = {id(weight): name for name, weight in model.named_parameters()}
    names = {name: first_names[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
    sets = {name: {weight for weight, kind in kinds.items() if kind in chosen} for name, chosen in _SETS.items()}
    trained: set[str] = set()
    if config.last_layers is not None:
        trained |= _last_layers(model, config.last_layers, first_names, kinds)
    elif not config.train:
        trained |= kinds.keys()
    for word in config.train:
        trained |= sets[word] if word in sets else _matched(names, word, "freeze.train", sets)
    for pattern in config.frozen:
        trained -= _matched(names, pattern, "freeze.frozen")
    if not trained:
        raise UserError(f"freeze.frozen={list(config.frozen)} leaves nothing of {type(model).__name__} to train")
    return trained


def _last_layers(model: PreTrainedModel, count: int, first_names: dict[int, str], kinds: dict[str, str]) -> set[str]:
    """The last layers' weights, and those of the norms that stand outside of layers."""
    layers = decoder_layers(model)
    if count > len(layers):
        raise UserError(
            f"freeze.last_layers={count} exceeds the {len(layers)} layers of {type(model).__name__}; lower it to "
            f"{len(layers)} or less, or give freeze.train=all_but_embeddings in its place"
        )
    inside = {first_names[id(weight)] for layer in layers for weight in layer.parameters()}
    last = {first_names[id(weight)] for layer in layers[-count:] for weight in layer.parameters()}
    return last | {name for name, kind in kinds.items() if kind == "norms" and name not in inside}


def _matched(names: dict[str, str], pattern: str, field: str, words: Iterable[str] = ()) -> set[str]:
    """First names of the parameters that a pattern matches.

    Args:
        names: every name of each parameter, with its first.
        words: what the field may hold beside patterns.
    """
    matched = {first for name, first in names.items() if fnmatchcase(name, pattern)}
    if not matched:
        allowed = [*words, *names]
        near = difflib.get_close_matches(pattern, allowed, n=3, cutoff=0.3) or allowed[:3]
        raise UserError(
            f"{field} has '{pattern}', which matches no parameter; near it are {', '.join(near)}; a pattern must match "
            "a whole name, with * for any part of it"
        )
    return matched


def kinds_of_weights(model: PreTrainedModel) -> dict[str, str]:
    """Each parameter's kind, one of `KINDS`, by the first of its names. Norms within attention are norms."""
    by_id: dict[int, str] = {}
    head = model.get_output_embeddings()
    for weight in head.parameters() if head is not None else ():
        by_id[id(weight)] = "head"
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        if norm or isinstance(module, torch.nn.Embedding):
            for weight in module.parameters(recurse=False):
                by_id[id(weight)] = "norms" if norm else "embeddings"
    return {name: by_id.get(id(weight)) or _kind_by_name(name) for name, weight in model.named_parameters()}


def _kind_by_name(name: str) -> str:
    for part in reversed(name.lower().split(".")):  # the nearest module tells: moe within attention's block is MLP
        for kind, marks in _KINDS_BY_NAME.items():
            if any(mark in part for mark in marks):
                return kind
    return "other"


@dataclass
class _Row:
    trained: int = 0
    frozen: int = 0
    saved_bytes: float = 0.0


def freeze_table(model: PreTrainedModel, optim: OptimConfig) -> list[str]:
    """A head, and a line for each kind of weights: numbers that train, that do not, and the memory which that saves."""
    kinds = kinds_of_weights(model)
    rows = {kind: _Row() for kind in KINDS if kind in kinds.values()}
    rows["all"] = _Row()
    known = True
    for name, weight in model.named_parameters():
        state = state_bytes(weight, optim.name, kind=kinds[name])
        known = known and state is not None
        for row in (rows[kinds[name]], rows["all"]):
            number = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty weight in its place
            if weight.requires_grad:
                row.trained += number
            else:
                row.frozen += number
                row.saved_bytes += number * weight.element_size() + (state or 0)
    spared = f"gradient and state of {optim.name}" if known else f"gradient, without the state of {optim.name}"
    lines = [("weights", "that train", "frozen", f"MiB saved ({spared})")]
    lines += [
        (kind, f"{row.trained:,}", f"{row.frozen:,}", f"{row.saved_bytes / 2**20:,.1f}") for kind, row in rows.items()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(line[column].rjust(widths[column]) for column in (1, 2, 3))])
        for line in lines
    ]


def state_bytes(weight: torch.Tensor, optimizer: str, *, kind: str) -> float | None:
    """Bytes of state that an optimizer keeps for a weight; None: not known.

    Args:
        optimizer: as `optim.name`.
        kind: one of `KINDS`. For embeddings bitsandbytes keeps float32, as transformers asks it to; Muon keeps one
            number for each of the layers' matrices, and AdamW beside it two for each of the rest.
    """
    number = getattr(weight, "ds_numel", weight.numel())
    if optimizer == MUON:
        return number * weight.element_size() * (1 if kind in ("attention", "MLP", "other") and weight.ndim == 2 else 2)
    if optimizer in _MOMENTS_8BIT:
        moments = _MOMENTS_8BIT[optimizer]
        small = number < _LEAST_8BIT or kind == "embeddings"
        return moments * (4.0 * number if small else number + 4.0 * number / 256)
    if optimizer in _MOMENTS:
        return _MOMENTS[optimizer] * number * (4 if optimizer in _FOUR_BYTE_STATE else weight.element_size())
    return None
