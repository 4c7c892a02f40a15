"""PEFT's methods by name: which of them train here, and a run's config made into a method's own.

    check_method(config.adapter)                                            # before anything is loaded
    settings = method_settings(config.adapter, targets="all-linear", revision=None)   # a LoraConfig, an OFTConfig, ...

What PEFT has is read from its own registry, so a method that a newer PEFT brings is there by its name.
"""

import dataclasses
import difflib
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, EvaConfig, PeftConfig, PromptLearningConfig

from config.schema import AdapterConfig
from utils.errors import UserError

LORA_RANK, LORA_ALPHA = 16, 32.0
"""LoRA's where the config leaves them open; of the other methods PEFT knows which suit them."""

_VIRTUAL = (
    "it puts virtual tokens before a sequence, which the positions and borders of packed documents do not count, nor "
    "does the loss"
)
_REFUSED = {
    "adaption_prompt": _VIRTUAL,
    "adalora": (
        "it adds a term to the model's own loss, which is not what is minimized here, and moves ranks between layers "
        "by sums that checkpoints do not hold"
    ),
    "poly": "each row must name the tasks it belongs to, which conversations do not",
    "shadow": "it trains a second model beside the first, with a loss of its own",
    "xlora": "it mixes adapters that are trained already; adapter.beside has several active at once",
}
_REFUSED_SETTINGS = {
    "alora_invocation_tokens": "it looks for a text in each sequence, which packed documents hide",
    "arrow_config": "it routes between adapters that are trained already",
    "corda_config": "its covariance must be collected by PEFT before the run",
    "kasa_config": "it cuts the base's weights and adds a term to the loss",
    "layer_replication": "it changes the base's layers",
    "lora_ga_config": "its gradients must be collected by PEFT before the run",
    "loftq_config": "adapter.init=loftq has PEFT's defaults",
    "megatron_config": "it is for models of Megatron",
    "monteclora_config": "it adds a term to the loss",
    "use_asa": "it must be told of every step, and forgets at a resume",
    "auxiliary_loss_weight": "it adds a term to the loss",
}
_FIELDS = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha", "{kind}_alpha"),
    "dropout": ("lora_dropout", "{kind}_dropout"),
    "rslora": ("use_rslora",),
    "dora": ("use_dora",),
    "init": ("init_lora_weights",),
    "target_modules": ("target_modules",),
    "target_parameters": ("target_parameters",),
    "modules_to_save": ("modules_to_save",),
    "trainable_tokens": ("trainable_token_indices", "token_indices"),
    "layers": ("layers_to_transform",),
}
"""What our fields are called in a method's config: the first of these that it has."""


def method_names() -> dict[str, type[PeftConfig]]:
    """PEFT's methods: their lower-case names, and the class of each one's config."""
    return {kind.value.lower(): settings for kind, settings in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def refusal(kind: str) -> str | None:
    """Why a method does not train here; None if it does."""
    if issubclass(method_names()[kind], PromptLearningConfig):
        return _VIRTUAL
    return _REFUSED.get(kind)


def check_method(config: AdapterConfig) -> None:
    """Check what can be known of an adapter without a model.

    Raises:
        UserError: there is no such method, it does not train here, or it lacks a field or setting that is given.
    """
    if config.kind == "none":
        return
    methods = method_names()
    if config.kind not in methods:
        near = difflib.get_close_matches(config.kind, ["none", *methods], n=1)
        usable = ", ".join(sorted(name for name in methods if refusal(name) is None))
        raise UserError(
            f"adapter.kind={config.kind} is no method of PEFT{f'; did you mean {near[0]}?' if near else ';'} "
            f"It takes none, {usable}"
        )
    if reason := refusal(config.kind):
        raise UserError(f"adapter.kind={config.kind} does not train here: {reason}. Use another, such as lora")
    fields, own = peft_fields(config.kind), _own_fields(config.kind)
    default = AdapterConfig()
    for name in ("rank", "alpha", "dropout", "modules_to_save", "trainable_tokens"):
        if getattr(config, name) != getattr(default, name) and name not in fields:
            given = getattr(config, name)
            like = [field for field in own if name in field]
            hint = f", such as {', '.join(like)}" if like else ""
            raise UserError(
                f"adapter.{name}={given} is given, and adapter.kind={config.kind} has no such field; leave it out. "
                f"adapter.settings takes its own{hint}"
            )
    if config.kind == "trainable_tokens" and not config.trainable_tokens and config.path is None:
        raise UserError("adapter.kind=trainable_tokens trains rows of tokens; name them in adapter.trainable_tokens")
    _check_settings(config, fields, own)


def _check_settings(config: AdapterConfig, fields: dict[str, str], own: list[str]) -> None:
    typed = {field: name for name, field in fields.items()} | {"layers_pattern": "layers"}
    for key in config.settings:
        if key in typed:
            raise UserError(f"adapter.settings.{key} is what adapter.{typed[key]} stands for; give that instead")
        if key not in own:
            near = difflib.get_close_matches(key, own, n=1)
            raise UserError(
                f"adapter.settings.{key} is no setting of adapter.kind={config.kind}"
                + (f"; did you mean {near[0]}?" if near else ";")
                + f" It takes {', '.join(own)}"
            )
        if key in _REFUSED_SETTINGS:
            raise UserError(f"adapter.settings.{key} does not work here: {_REFUSED_SETTINGS[key]}. Leave it out")


def peft_fields(kind: str) -> dict[str, str]:
    """What those of our fields that a method has are called in its config."""
    names = {part.name for part in dataclasses.fields(method_names()[kind])}
    found = {}
    for name, candidates in _FIELDS.items():
        field = next((own for text in candidates if (own := text.format(kind=kind)) in names), None)
        if field is not None:
            found[name] = field
    return found


def _own_fields(kind: str) -> list[str]:
    """A method's fields that none of ours stands for, nor PEFT fills in itself."""
    common = {part.name for part in dataclasses.fields(PeftConfig)}
    taken = common | set(peft_fields(kind).values()) | {"layers_pattern"}
    return sorted(part.name for part in dataclasses.fields(method_names()[kind]) if part.name not in taken)


def method_settings(
    config: AdapterConfig,
    *,
    targets: str | list[str] | None,
    revision: str | None = None,
    token_rows: dict[str, list[int]] | None = None,
    keeps_ties: bool = False,
) -> PeftConfig:
    """A method's own config.

    Args:
        targets: as `adapter_targets.target_names` tells them.
        revision: of the base on the Hub, which the adapter names so that it finds the same one again.
        token_rows: rows that train, by the module that they are rows of.
        keeps_ties: whether what is trained in full of a tied pair stays one weight.
    Raises:
        UserError: PEFT refuses the values.
    """
    fields = peft_fields(config.kind)
    given: dict[str, Any] = {
        "rank": config.rank or (LORA_RANK if config.kind == "lora" else None),
        "alpha": config.alpha or (LORA_ALPHA if config.kind == "lora" else None),
        "dropout": config.dropout,
        "target_modules": targets,
        "modules_to_save": list(config.modules_to_save) or None,
        "target_parameters": list(config.target_parameters) or None,
        "trainable_tokens": token_rows or None,
    }
    if config.kind == "lora":
        given |= {"rslora": config.rslora, "dora": config.dora, "init": _init_of(config.init)}
    values = {fields[name]: value for name, value in given.items() if value is not None and name in fields}
    if config.kind == "lora" and config.init == "eva":
        values["eva_config"] = EvaConfig()
    if config.kind == "oft" and config.rank is not None:
        values["oft_block_size"] = 0  # either of the two decides the other
    if config.kind == "ia3" and targets is not None:
        values["feedforward_modules"] = []
    if config.kind == "trainable_tokens":
        values = {"target_modules": list(token_rows), "token_indices": next(iter(token_rows.values()))}
    if keeps_ties:
        values["ensure_weight_tying"] = True
    try:
        return method_names()[config.kind](task_type="CAUSAL_LM", revision=revision, **(values | config.settings))
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(
            f"PEFT refuses the adapter of adapter.kind={config.kind}: {' '.join(str(error).split())[:300]}; change "
            "that field, or adapter.settings"
        ) from error


def _init_of(init: str) -> bool | str:
    """PEFT's word for what LoRA matrices start from; LoftQ's own are put in later, beside weights that stay."""
    return True if init in ("default", "loftq") else init
