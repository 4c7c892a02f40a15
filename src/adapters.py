"""What trains beside frozen weights: an adapter that is new or goes on, and others that stay active under it.

model = add_adapter(load_model(...), config.adapter, tokenizer=tokenizer, first_new_row=rows)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.adapter_constraints import CHANGES_BASE
from config.schema import AdapterConfig
from src.adapter_methods import check_method, method_settings, peft_fields
from src.adapter_paths import NEW, activate, continued, put_beside
from src.adapter_starts import start_from_rounding_errors
from src.adapter_targets import check_saved, matching, sides_of_a_tie, target_names, tied_names
from src.sharding import refuse_under_fsdp
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    first_new_row: int | None = None,
    checkpoint: Path | None = None,
) -> PreTrainedModel | PeftModel:
    """Freeze the model and put an adapter beside it, or leave it to train whole.

    Args:
        revision: of the base on the Hub, which the adapter names so that it finds the same one again.
        tokenizer: tells the rows of `trainable_tokens`; needed for these only.
        first_new_row: row of the embeddings from which on they were added for this run. None: none was.
        checkpoint: that the run goes on from, whose weights are loaded later.
    Raises:
        UserError: the method, a name, a token or another adapter does not suit the model.
    """
    if config.kind == "none":
        return model
    check_method(config)
    # To recompute activations, transformers and PEFT each have the embeddings' output ask for a gradient, which only
    # reentrant checkpoints need: the backward pass would go on below the first layer that has anything to train. Each
    # is taken back on its own, as the second's hooks take the place of the first's in the model's list.
    model.disable_input_require_grads()
    if config.path is not None:
        adapted = continued(model, config)
        _tell_of_untrained_rows(adapted, first_new_row)
    elif checkpoint is not None and config.init == "eva":  # which has dealt out the ranks by the first batches
        settings = PeftConfig.from_pretrained(checkpoint)
        settings.inference_mode = False
        adapted = get_peft_model(model, settings)
    else:
        adapted = _started(model, config, revision, tokenizer, first_new_row)
        if config.init == "loftq" and checkpoint is None:
            start_from_rounding_errors(adapted, revision)
    adapted.disable_input_require_grads()
    put_beside(adapted, config.beside)
    activate(adapted)
    if config.export_as_lora and not adapted.base_model.supports_lora_conversion():
        raise UserError(
            f"adapter.export_as_lora: an adapter of adapter.kind={config.kind} adds nothing to a weight that LoRA "
            "could hold; leave it out, or use loha, lokr, hira or another that does"
        )
    return adapted


def _tell_of_untrained_rows(model: PeftModel, first_new_row: int | None) -> None:
    """Warn where an adapter that goes on does not train all rows that this run added."""
    rows = getattr(model.peft_config[NEW], "trainable_token_indices", None) or []
    known = {row for own in (rows.values() if isinstance(rows, dict) else [rows]) for row in own}
    end = model.get_input_embeddings().weight.shape[0]
    if first_new_row is not None and set(range(first_new_row, end)) - known:
        log.warning(
            "tokens that are new to the base do not train: adapter.path has no rows of theirs; use the tokenizer that "
            "is beside that adapter as model.tokenizer, or start a new adapter"
        )


def _started(
    model: PreTrainedModel,
    config: AdapterConfig,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    first_new_row: int | None,
) -> PeftModel:
    """The model with a new adapter."""
    targets = None if config.kind == "trainable_tokens" else target_names(model, config)
    check_saved(model, config)
    _check_ties(model, config)
    settings = method_settings(
        config,
        targets=targets,
        revision=revision,
        token_rows=_token_rows(model, config, tokenizer, first_new_row),
        keeps_ties=bool(sides_of_a_tie(model, config.modules_to_save)),
    )
    if config.init.startswith(CHANGES_BASE):
        _check_start(model, config, first_new_row)
    try:
        return get_peft_model(model, settings)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"adapter.kind={config.kind} cannot be put beside {type(model).__name__}: "
            f"{' '.join(str(error).split())[:300]}; change adapter.target_modules, adapter.init or "
            "adapter.settings, or use another adapter"
        ) from error


def _check_start(model: PreTrainedModel, config: AdapterConfig, first_new_row: int | None) -> None:
    """
    Raises:
        UserError: a target is one whose start cannot be taken out, or put back when it is saved.
    """
    modules = {name: module for name, module in model.named_modules() if module is not model}
    targets = {name for pattern in config.target_modules for name in matching(pattern, modules)}
    embeddings = [name for name in targets if isinstance(modules[name], torch.nn.Embedding)]
    head = [name for name in targets if modules[name] is model.get_output_embeddings()]
    if embeddings or (head and first_new_row is not None):
        raise UserError(
            f"adapter.init={config.init} cannot start beside {(embeddings or head)[0]}"
            f"{'' if embeddings else ', to which this run adds rows'}; take it out of adapter.target_modules"
        )


def _check_ties(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Refuse what would part the embeddings from a head that is the same weight.

    PEFT keeps modules that train in full tied if it is told to, and so it is. An adapter beside one side alone would
    be lost to the other when it is merged.

    Raises:
        UserError: a target, or for another method than LoRA and under FSDP a module to save, is one side of a tie.
    """
    if sides := sides_of_a_tie(model, config.target_modules):
        raise UserError(
            f"adapter.target_modules has {', '.join(sides)}, and {type(model).__name__} uses one weight for its "
            "embeddings and its head; name it in adapter.modules_to_save, which trains both as one, or leave it out"
        )
    sides = sides_of_a_tie(model, config.modules_to_save)
    if sides:
        refuse_under_fsdp(model, f"adapter.modules_to_save {', '.join(sides)}")
    if sides and config.kind != "lora":
        raise UserError(
            f"adapter.modules_to_save has {', '.join(sides)}, and {type(model).__name__} uses one weight for its "
            f"embeddings and its head, which adapter.kind={config.kind} would part; leave it out, or use lora"
        )


def _token_rows(
    model: PreTrainedModel,
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    first_new_row: int | None,
) -> dict[str, list[int]]:
    """Rows of the embeddings and the head that train, by module: those of `trainable_tokens` and those that are new.

    Raises:
        UserError: a token is none of the tokenizer's, what it is a row of trains in another way, FSDP cannot part it,
            or the adapter's start cannot be beside it.
    """
    rows = set() if first_new_row is None else set(range(first_new_row, model.get_input_embeddings().weight.shape[0]))
    if rows and "trainable_tokens" not in peft_fields(config.kind):
        log.warning(
            "the adapter will hold the grown embeddings whole, and their new rows do not train, as adapter.kind=%s has "
            "no rows that train; use lora, or name special tokens that the tokenizer has in model.special_tokens",
            config.kind,
        )
        return {}
    vocabulary = tokenizer.get_vocab() if config.trainable_tokens else {}
    for token in config.trainable_tokens:
        if token not in vocabulary:
            raise UserError(
                f"adapter.trainable_tokens has {token!r}, which is no token of the tokenizer; add it with "
                "model.special_tokens, or name one that it has"
            )
        rows.add(vocabulary[token])
    modules = {module: name for name, module in model.named_modules()}
    sides = [modules[model.get_input_embeddings()]]
    if model.get_output_embeddings() is not None and not tied_names(model):
        sides.append(modules[model.get_output_embeddings()])
    whole = [side for side in sides if any(matching(pattern, [side]) for pattern in config.modules_to_save)]
    low = [side for side in sides if any(matching(pattern, [side]) for pattern in config.target_modules)]
    if tied_names(model) and sides_of_a_tie(model, config.modules_to_save):
        whole = sides
    if config.trainable_tokens and (whole or low):
        raise UserError(
            f"adapter.trainable_tokens trains rows of {', '.join(whole + low)}, which trains in another way already; "
            "leave out adapter.trainable_tokens, or take it out of the modules"
        )
    rest = [side for side in sides if rows and side not in whole + low]
    if rest and config.init == "eva":
        raise UserError(
            f"adapter.init=eva cannot start beside single rows of {', '.join(rest)} that train, those of new tokens or "
            "of adapter.trainable_tokens, as PEFT takes what holds them for a layer of LoRA; give "
            f"adapter.modules_to_save {[side.rpartition('.')[2] for side in rest]}, which trains them whole, or "
            "another adapter.init"
        )
    if rest and tied_names(model):
        refuse_under_fsdp(model, "rows of single tokens")
    return {side: sorted(rows) for side in rest}


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
