"""The module in which numbers stop being finite: found by computing a batch again, with hooks on every module.

    found = first_bad_module(model, lambda: score(model, batch).total)
    found.module, found.place           # "model.layers.3.mlp.down_proj", "forward"
    bad_weights(model)                  # names of the weights that are not finite themselves

Weights and their gradients stay as they are.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class BadModule:
    """Where numbers stop being finite: in a module's output, in the loss, or in a module's gradients.

    `module` is its dotted name, empty where it is the loss that is not finite while all outputs are.
    """

    module: str
    place: Literal["forward", "loss", "backward"]


def first_bad_module(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> BadModule | None:
    """The first module whose output is not finite though its inputs are; or else, in the order of the backward pass,
    the first that makes gradients which are not finite of such as are.

    Args:
        model: not wrapped by DDP or its like.
        loss_of: computes the loss of a batch by the model, a scalar.
    Returns:
        None if all is finite.
    """
    if bad := first_bad_output(model, loss_of):
        return bad
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        with _watched(model, _backward_hook) as found, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # frozen weights before it
            warnings.filterwarnings("ignore", "For backward hooks to be called")  # outputs in a class of transformers
            gradients = torch.autograd.grad(loss_of(), list(weights.values()), allow_unused=True)
    except RuntimeError as error:  # a model that changes a module's output in place takes no such hooks
        log.info("%s takes no backward hooks (%s); its weights' gradients are looked at", type(model).__name__, error)
        gradients = torch.autograd.grad(loss_of(), list(weights.values()), allow_unused=True)
    if found:
        return BadModule(found[0], "backward")
    bad = [name for name, grad in zip(weights, gradients, strict=True) if grad is not None and not _finite(grad)]
    # The backward pass comes by the last of them first.
    return BadModule(bad[-1].rpartition(".")[0], "backward") if bad else None


def first_bad_output(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> BadModule | None:
    """What `first_bad_module` finds without a backward pass: each process takes one forward pass, whatever it finds, so
    that processes which share the weights can call this together."""
    with torch.no_grad(), _watched(model, _forward_hook) as found:
        loss = loss_of()
    if found:
        return BadModule(found[0], "forward")
    return None if bool(torch.isfinite(loss)) else BadModule("", "loss")


def bad_weights(model: torch.nn.Module) -> list[str]:
    """Names of the weights of which some number is not finite; of a sharded model, in this process's part."""
    local = ((name, getattr(weight, "to_local", lambda weight=weight: weight)()) for name, weight in _weights(model))
    flags = [(name, torch.isfinite(weight.detach()).all()) for name, weight in local]
    finite = torch.stack([flag for _, flag in flags]).tolist() if flags else []
    return [name for (name, _), flag in zip(flags, finite, strict=True) if not flag]


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of floating point: quantized ones are integers, and hold no NaN."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.is_floating_point())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of floating point in the arguments or the output of a module."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if "mask" not in str(name):  # in masks, minus infinity is at its place
                yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in _tensors(value))


def _forward_hook(module: torch.nn.Module, name: str, found: list[str]) -> Any:
    def look(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not found and not _finite(output) and _finite(args) and _finite(kwargs):
            found.append(name)

    return module.register_forward_hook(look, with_kwargs=True)


def _backward_hook(module: torch.nn.Module, name: str, found: list[str]) -> Any:
    def look(module: torch.nn.Module, grad_input: Any, grad_output: Any) -> None:
        if not found and not _finite(grad_input) and _finite(grad_output):
            found.append(name)

    return module.register_full_backward_hook(look)


@contextlib.contextmanager
def _watched(model: torch.nn.Module, hook: Callable[[torch.nn.Module, str, list[str]], Any]) -> Iterator[list[str]]:
    """Hooks on each module while the context lasts, and the list that the first of them to find anything fills."""
    found: list[str] = []
    handles = [hook(module, name, found) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
