"""What the fields on the base must satisfy together: what its weights are held in, and which of them train.

    problems = list(base_problems(config))

A part of the rules in `config.constraints`, which gathers them all.
"""

import dataclasses
from collections.abc import Iterator

from config.schema import FreezeConfig, ModelConfig, RunConfig

FOUR_BIT = ("nf4", "fp4")


def base_problems(config: RunConfig) -> Iterator[str]:
    """One sentence for each rule that is broken."""
    yield from _quantization(config)
    yield from _qat(config)
    yield from _freeze(config)


def _quantization(config: RunConfig) -> Iterator[str]:
    """The format that frozen weights are held in."""
    model, kind = config.model, config.model.quantization
    if kind not in FOUR_BIT and model.double_quant != ModelConfig().double_quant:
        yield (
            f"model.double_quant={str(model.double_quant).lower()} given with model.quantization={kind}; it is of "
            f"{' and '.join(FOUR_BIT)} alone; leave it out, or give model.quantization=nf4"
        )
    if kind == "none":
        return
    if config.adapter.kind == "none":
        yield (
            f"model.quantization={kind} freezes the weights and adapter.kind=none trains them; give adapter.kind=lora, "
            "or model.quantization=none"
        )
    if model.dtype == "float64":
        yield (f"model.quantization={kind} cannot compute in model.dtype=float64; use model.dtype=bfloat16, or auto")


def _qat(config: RunConfig) -> Iterator[str]:
    """Rounding while every weight trains."""
    model, fake = config.model, config.model.qat
    if fake == "none":
        return
    if config.adapter.kind != "none":
        yield (
            f"model.qat={fake} trains the weights themselves to be rounded and adapter.kind="
            f"{config.adapter.kind} freezes them; give adapter.kind=none, or a model.quantization in its place"
        )
    if model.dtype == "float64":
        yield f"model.qat={fake} rounds in float32, which model.dtype=float64 is not; use float32"


def _freeze(config: RunConfig) -> Iterator[str]:
    """Which of the model's own weights train."""
    freeze = config.freeze
    names = [part.name for part in dataclasses.fields(FreezeConfig)]
    changed = [name for name in names if getattr(freeze, name) != getattr(FreezeConfig(), name)]
    if changed and config.adapter.kind != "none":
        yield (
            f"{', '.join(f'freeze.{name}' for name in changed)} given with adapter.kind={config.adapter.kind}, which "
            "freezes every weight of the model; leave out the section freeze, or give adapter.kind=none; "
            "adapter.modules_to_save trains modules beside an adapter"
        )
    if freeze.last_layers is not None and "all_but_embeddings" in freeze.train:
        yield (
            f"freeze.last_layers={freeze.last_layers} has no effect beside freeze.train=all_but_embeddings; leave one "
            "of them out"
        )
