"""What the fields of an adapter must satisfy together, before a library is asked.

    problems = list(adapter_problems(config))

Part of `config.constraints`, which says more. What PEFT alone knows, such as its methods' names, `src.adapter_methods`
checks.
"""

import dataclasses
import re
from collections.abc import Iterator

from config.schema import AdapterConfig, RunConfig

INITS = ("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N", "loftq", "eva")
"""What `adapter.init` takes; N is a whole number."""

CHANGES_BASE = ("olora", "pissa")
"""Beginnings of the inits that take the matrices' start out of the frozen weight."""

_INIT = re.compile(r"default|gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d*|loftq|eva")
_LAYERS = re.compile(r"last [1-9]\d*|\d+(-\d*)?(,\d+(-\d*)?)*")
_NEED = {
    "corda": "adapter.init=corda needs a covariance that PEFT collects over data of your own before the run",
    "lora_ga": "adapter.init=lora_ga needs gradients that PEFT collects before the run",
}
_LORA_ONLY = ("rslora", "dora", "init", "target_parameters", "beside")
_DECIDED_BY_PATH = ("layers", "target_parameters", "trainable_tokens", "init", "beside", "export_as_lora")


def adapter_problems(config: RunConfig) -> Iterator[str]:
    """Each broken rule as a sentence."""
    adapter = config.adapter
    default = AdapterConfig()
    options = [part.name for part in dataclasses.fields(AdapterConfig) if part.name != "kind"]
    changed = [name for name in options if getattr(adapter, name) != getattr(default, name)]
    if adapter.kind == "none" and changed:
        names = ", ".join(f"adapter.{name}" for name in changed)
        yield f"{names} given with adapter.kind=none, which has no adapter; give adapter.kind=lora, or leave them out"
    if "all-linear" in adapter.target_modules and len(adapter.target_modules) > 1:
        targets = ", ".join(adapter.target_modules)
        yield f"adapter.target_modules={targets} names all-linear beside others; keep all-linear alone, or the others"
    if adapter.layers is not None and not _LAYERS.fullmatch(adapter.layers):
        yield f"adapter.layers={adapter.layers} names no layers; give such as 0-7, 8-, 3,5 or last 4"
    if adapter.kind not in ("none", "lora"):
        for name in changed:
            if name in _LORA_ONLY:
                yield (
                    f"adapter.{name} is LoRA's own, and adapter.kind={adapter.kind}; leave it out, or give "
                    "adapter.kind=lora"
                )
    if adapter.path is not None:
        for name in changed:
            if name in _DECIDED_BY_PATH:
                yield (
                    f"adapter.{name} is given with adapter.path={adapter.path}, which has its own; leave out either of "
                    "them"
                )
    if adapter.export_as_lora and adapter.kind == "lora":
        yield "adapter.export_as_lora has no meaning with adapter.kind=lora, which is one already; leave it out"
    yield from _parts(adapter)
    yield from _init(config)


def _parts(adapter: AdapterConfig) -> Iterator[str]:
    """Parts of a model that LoRA cannot have in that way."""
    if adapter.target_parameters and adapter.dropout:
        yield (
            f"adapter.dropout={adapter.dropout} and adapter.target_parameters exclude each other, as a parameter has "
            "no input to drop; leave out adapter.dropout"
        )
    if adapter.target_parameters and adapter.dora:
        yield "adapter.dora and adapter.target_parameters exclude each other; leave out either of them"


def _init(config: RunConfig) -> Iterator[str]:
    """What LoRA matrices start from, and what that goes with."""
    adapter, init, base = config.adapter, config.adapter.init, config.model.quantization
    if init in _NEED:
        yield f"{_NEED[init]}; use one of {', '.join(INITS)}"
    elif not _INIT.fullmatch(init):
        yield f"adapter.init={init} is no choice; it takes one of {', '.join(INITS)}"
    if init.startswith(CHANGES_BASE) and adapter.dora:
        yield (
            f"adapter.init={init} ends as plain LoRA, which cannot hold the lengths of adapter.dora; leave out either "
            "of them"
        )
    if init == "eva" and adapter.beside:
        yield "adapter.init=eva knows one adapter alone, and adapter.beside has more; use another adapter.init"
    if init == "loftq" and base not in ("nf4", "fp4"):
        yield (
            f"adapter.init=loftq makes up for the error of 4-bit weights, and model.quantization={base}; give "
            "model.quantization=nf4, or another adapter.init"
        )
    if init.startswith(CHANGES_BASE) and base != "none":
        yield (
            f"adapter.init={init} takes the start of the matrices out of the frozen weight, and "
            f"model.quantization={base} would round what is left anew, so that the saved adapter fits no base that "
            "anyone has; use adapter.init=default, or model.quantization=none"
        )
