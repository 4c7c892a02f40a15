"""Adapters that were trained before: one to go on from, and others that stay frozen and active beside a new one.

model = continued(base, config.adapter)
put_beside(model, config.adapter.beside)
activate(model)                             # after every load of weights, which leaves one adapter active
"""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from config.schema import AdapterConfig
from src.adapter_methods import peft_fields
from utils.errors import UserError

NEW = "default"
"""PEFT's name of the adapter that trains."""


def continued(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """The model with an adapter that was trained before, ready to train on.

    Raises:
        UserError: it is not there, belongs to another base, or has other settings than the config.
    """
    settings = _read_settings(config.path, "adapter.path")
    _check_base(settings, config.path, "adapter.path", model)
    kind = settings.peft_type.value.lower()
    if kind != config.kind:
        raise UserError(f"adapter.path={config.path} is of kind {kind}, and adapter.kind={config.kind}; give {kind}")
    if str(getattr(settings, "init_lora_weights", True)).lower().startswith(("pissa", "olora", "corda")):
        raise UserError(
            f"adapter.path={config.path} fits a base that its start was taken from, as checkpoints within a run do; "
            "give the model/ folder of that run, or go on with --resume"
        )
    fields, default = peft_fields(kind), AdapterConfig()
    given = {
        fields[name]: (f"adapter.{name}", getattr(config, name))
        for name in ("rank", "alpha", "dropout", "rslora", "dora", "target_modules", "modules_to_save")
        if name in fields and getattr(config, name) != getattr(default, name)
    }
    given |= {key: (f"adapter.settings.{key}", value) for key, value in config.settings.items()}
    for key, (name, value) in given.items():
        own = getattr(settings, key)
        sequence = isinstance(own, list | set | tuple)
        if (set(own) != set(value)) if sequence and not isinstance(value, str | int | float) else own != value:
            raise UserError(
                f"{name}={value} contradicts adapter.path={config.path}, which has {key}={own}; leave out {name}"
            )
    return PeftModel.from_pretrained(model, config.path, adapter_name=NEW, is_trainable=True)


def _read_settings(path: str, field: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(path)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{field}={path} holds no adapter ({' '.join(str(error).split())[:200]}); give a folder with "
            "adapter_config.json, or a Hub id"
        ) from error


def _check_base(settings: PeftConfig, path: str, field: str, model: PreTrainedModel) -> None:
    """
    Raises:
        UserError: an adapter was trained beside another base.
    """
    own, base = settings.base_model_name_or_path, model.name_or_path
    if own is not None and own != base and Path(own).resolve() != Path(base).resolve():
        raise UserError(
            f"{field}={path} was trained beside {own}, and model.path={base}; give that base, or correct "
            "base_model_name_or_path in its adapter_config.json if they are the same"
        )


def put_beside(model: PeftModel, paths: Sequence[str]) -> None:
    """Load more adapters, which do not train; `activate` makes them add to the output.

    Raises:
        UserError: it is not there, is no LoRA that adds to the base's output alone, or belongs to another base.
    """
    for number, path in enumerate(paths):
        settings = _read_settings(path, "adapter.beside")
        _check_base(settings, path, "adapter.beside", model.get_base_model())
        kind = settings.peft_type.value.lower()
        more = [
            part for part in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(settings, part, None)
        ]
        if kind != "lora" or more:
            raise UserError(
                f"adapter.beside={path} is {kind}{f' with {more[0]}' if more else ''}, of which only one can be "
                "active; merge it into the base first"
            )
        model.load_adapter(path, adapter_name=f"beside_{number}", is_trainable=False)


def activate(model: PeftModel) -> None:
    """Have every adapter add to the output, and the new one alone train."""
    names = list(model.peft_config)
    if len(names) < 2:
        return
    model.base_model.set_adapter([NEW, *(name for name in names if name != NEW)])
    for parameter, values in model.named_parameters():
        if any(f".{name}." in f"{parameter}." for name in names if name != NEW):
            values.requires_grad_(False)
