"""Which modules of a model get an adapter: names, patterns and layers, told as PEFT takes them.

    targets = target_names(model, config.adapter)      # "all-linear", or names
    check_saved(model, config.adapter)
    tied = tied_names(model)                           # ("model.embed_tokens", "lm_head"), or nothing

A pattern is the end of a module's name, whole parts of it. In it `*` stands for any text without a dot.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from config.schema import AdapterConfig
from utils.errors import UserError

ALL = "all-linear"

OWN_CHOICE = ("ia3", "ln_tuning")
"""Methods that are no use on every linear layer, for which `all-linear` means what PEFT chooses for the model."""


def target_names(model: torch.nn.Module, config: AdapterConfig) -> str | list[str] | None:
    """The modules that get an adapter, as PEFT's `target_modules` takes them.

    Args:
        model: may be on the meta device.
    Returns:
        `all-linear`; endings of names as they were given; full names where there are patterns or layers; or None where
        PEFT shall choose.
    Raises:
        UserError: a pattern matches no module, or none within the layers.
    """
    if ALL in config.target_modules and len(config.target_modules) > 1:
        raise UserError(
            f"adapter.target_modules={list(config.target_modules)} names all-linear beside others; keep either"
        )
    if ALL in config.target_modules and config.layers is None:
        return None if config.kind in OWN_CHOICE else ALL
    kinds = torch.nn.Module if config.kind == "ln_tuning" else (torch.nn.Linear, torch.nn.Embedding)
    modules = _names(model, kinds)
    layers = None if config.layers is None else chosen_layers(config.layers, count_layers(model))
    found: list[str] = []
    for pattern in config.target_modules:
        matches = _linear_layers(model) if pattern == ALL else matching(pattern, modules)
        if not matches:
            raise UserError(_no_match("target_modules", pattern, modules, model))
        within = [name for name in matches if layers is None or _layer_of(name) in (None, *layers)]
        if not within:
            raise UserError(
                f"adapter.target_modules has '{pattern}', which matches modules, but none in adapter.layers="
                f"{config.layers}; it stands in layers {_told(_layer_of(name) for name in matches)}"
            )
        found += within
    if layers is None and not any("*" in pattern for pattern in config.target_modules):
        return list(config.target_modules)
    return list(dict.fromkeys(found))


def check_saved(model: torch.nn.Module, config: AdapterConfig) -> None:
    """
    Raises:
        UserError: a name of `modules_to_save` or `target_parameters` matches nothing.
    """
    modules = _names(model, torch.nn.Module)
    for pattern in config.modules_to_save:
        if not matching(pattern, modules):
            raise UserError(_no_match("modules_to_save", pattern, modules, model))
    parameters = [name for name, _ in model.named_parameters()]
    for pattern in config.target_parameters:
        if not matching(pattern, parameters):
            raise UserError(_no_match("target_parameters", pattern, parameters, model))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of the names that end as the pattern says, in whole parts."""
    body = "".join("[^.]*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern))
    expression = re.compile(rf"(.*\.)?{body}")
    return [name for name in names if expression.fullmatch(name)]


def count_layers(model: torch.nn.Module) -> int:
    """Layers of a model, by the numbers in its modules' names."""
    return max((_layer_of(name) for name, _ in model.named_modules() if _layer_of(name) is not None), default=-1) + 1


def chosen_layers(text: str, count: int) -> tuple[int, ...]:
    """Layers by number: `0-7`, `8-`, `3,5` or `last 4`.

    Args:
        count: layers that there are.
    Raises:
        UserError: one of them is not there, or a range runs backwards.
    """
    if text.startswith("last "):
        number = int(text.removeprefix("last "))
        spans = [(count - number, count - 1)]
    else:
        ends = [part.partition("-") for part in text.split(",")]
        spans = [(int(first), int(last) if last else count - 1 if dash else int(first)) for first, dash, last in ends]
    for first, last in spans:
        if not 0 <= first <= last < count:
            raise UserError(
                f"adapter.layers={text} does not suit a model of {count} layers, 0 to {count - 1}; name some of these"
            )
    return tuple(sorted({layer for first, last in spans for layer in range(first, last + 1)}))


def tied_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the input embeddings and the head where they are one weight; else nothing."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or inputs is None or getattr(head, "weight", None) is not inputs.weight:
        return ()
    return tuple(name for name, module in model.named_modules() if module is inputs or module is head)


def sides_of_a_tie(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Those of the patterns that match the embeddings or the head of a model that ties them."""
    tied = tied_names(model)
    return [pattern for pattern in patterns if pattern != ALL and matching(pattern, tied)]


def _layer_of(name: str) -> int | None:
    """The first number in a module's name, which is that of its layer; those of experts come later."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _linear_layers(model: torch.nn.Module) -> list[str]:
    """Every linear layer but the head."""
    head = model.get_output_embeddings()
    inner = dict(model.named_modules())
    return [name for name in _names(model, torch.nn.Linear) if inner[name] is not head]


def _names(model: torch.nn.Module, kinds: type | tuple[type, ...]) -> list[str]:
    """Full names of the modules of some kinds; GPT-2's Conv1D counts as linear."""
    return [
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
    ]


def _no_match(field: str, pattern: str, names: Sequence[str], model: torch.nn.Module) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    kind = "parameter" if field == "target_parameters" else "module"
    return (
        f"adapter.{field} has '{pattern}', which matches no {kind} of {type(model).__name__}; names that exist: "
        f"{', '.join(endings)}"
    )


def _told(layers: Iterable[int | None]) -> str:
    return ", ".join(str(layer) for layer in sorted({layer for layer in layers if layer is not None}))
