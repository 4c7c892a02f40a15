"""What trains: every weight, or a low-rank adapter beside frozen weights.

model = add_adapter(load_model(...), config.adapter)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from config.schema import AdapterConfig
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)


def add_adapter(
    model: PreTrainedModel, config: AdapterConfig, *, revision: str | None = None
) -> PreTrainedModel | PeftModel:
    """Freeze the model and put an adapter beside it, or leave it to train whole.

    Args:
        revision: of the base on the Hub, which the adapter names so that it finds the same one again.
    Raises:
        UserError: a pattern of `target_modules` or `modules_to_save` matches no module.
    """
    if config.kind == "none":
        return model
    check_patterns(model, config)
    targets = "all-linear" if "all-linear" in config.target_modules else list(config.target_modules)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=list(config.modules_to_save) or None,
        use_rslora=config.rslora,
        revision=revision,
    )
    # To recompute activations, transformers and PEFT each have the embeddings' output ask for a gradient, which only
    # reentrant checkpoints need: the backward pass would go on below the first layer that has anything to train. Each
    # is taken back on its own, as the second's hooks take the place of the first's in the model's list.
    model.disable_input_require_grads()
    adapted = get_peft_model(model, settings)
    model.disable_input_require_grads()
    return adapted


def layers_without_dropout(model: torch.nn.Module) -> list[LoraLayer]:
    """The layers that have LoRA matrices beside them, and no dropout before those."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [
        layer for layer in layers if not any(isinstance(part, torch.nn.Dropout) for part in layer.lora_dropout.values())
    ]


@contextmanager
def casts_left_to_autocast(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Have adapters take a layer's input in the number format that it comes in, while the context lasts.

    PEFT casts it to that of the adapter's weights, float32, and autocast casts it back before the product: two copies
    of the input forward and two backward for each layer, of which no number changes anything. Autocast must be on, and
    what is computed again in the backward pass must be so within the context too.

    Args:
        layers: from `layers_without_dropout`; dropout in bfloat16 would scale by a factor that is rounded to 8 bits.
    """
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def check_patterns(model: torch.nn.Module, config: AdapterConfig) -> None:
    """Make sure that every name in the config is that of a module.

    Args:
        model: may be on the meta device.
    Raises:
        UserError: one is not, or `all-linear` stands beside other names.
    """
    if "all-linear" in config.target_modules and len(config.target_modules) > 1:
        raise UserError(
            f"adapter.target_modules={list(config.target_modules)} names all-linear beside others; keep either"
        )
    for field, patterns, modules in (
        ("target_modules", config.target_modules, _names(model, (torch.nn.Linear, torch.nn.Embedding))),
        ("modules_to_save", config.modules_to_save, _names(model, torch.nn.Module)),
    ):
        for pattern in patterns:
            if pattern != "all-linear" and not any(name == pattern or name.endswith(f".{pattern}") for name in modules):
                endings = sorted({name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit()})
                raise UserError(
                    f"adapter.{field} has '{pattern}', which matches no module of {type(model).__name__}; names that "
                    f"exist: {', '.join(endings)}"
                )


def _names(model: torch.nn.Module, kinds: type | tuple[type, ...]) -> list[str]:
    """Full names of the modules of some kinds; GPT-2's Conv1D counts as linear."""
    return [
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
    ]


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers that train and in all; a 4-bit weight counts as the numbers that it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        number = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            number *= 2 * parameter.element_size()  # two 4-bit numbers a byte
        total += number
        trainable += number if parameter.requires_grad else 0
    return {"trainable": trainable, "total": total}
