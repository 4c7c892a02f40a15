"""Which checkpoints are causal language models that can be trained, told from their config before weights load.

check_code(source, revision, trusted=config.trust_remote_code)
settings = AutoConfig.from_pretrained(source, ...)
check_family(settings, "model.path=folder")
"""

import inspect
import re
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from utils.errors import UserError

SENSES = ("vision_config", "audio_config", "speech_config")
"""Parts of configs that stand for inputs other than text."""

_LOADED_WHOLE = (
    "w = AutoModelForImageTextToText.from_pretrained('{source}', dtype='auto'); "
    "t = AutoModelForCausalLM.from_config(w.config.text_config, dtype=w.dtype); "
    "t.model, t.lm_head = w.model.language_model, w.lm_head; t.save_pretrained('text-only')"
)
_LOADED_ALONE = "AutoModelForCausalLM.from_pretrained('{source}', dtype='auto').save_pretrained('text-only')"

TEXT_ONLY = {"gemma3": _LOADED_WHOLE, "llama4": _LOADED_ALONE}
"""How the text-only part of a checkpoint is saved by itself, by its `model_type`: those that are known to work."""


def causal_class(settings: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that makes a causal language model of a config, or None where there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)


def check_family(settings: PreTrainedConfig, given: str) -> None:
    """Make sure that a config is that of a causal language model, of text alone.

    Args:
        given: the field that it comes from, and its value.
    Raises:
        UserError: it sees or hears, has an encoder, or is of a kind that predicts no next token.
    """
    kind = settings.model_type
    other = next((name for name in SENSES if getattr(settings, name, None) is not None), None)
    if other is not None:
        raise UserError(
            f"{given} is a '{kind}' with {other}, and only models of text alone are trained; "
            + _text_only(settings, given.partition("=")[2])
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise UserError(
            f"{given} is a '{kind}', an encoder with a decoder, and only causal language models are trained, which "
            "have a decoder alone; give one of those"
        )
    if "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {}):
        return  # its own code has such a class
    if causal_class(settings) is None:
        raise UserError(
            f"{given} is a '{kind}', of which transformers has no causal language model; give one of a kind that has, "
            "such as llama"
        )
    causal = any(getattr(settings, name, False) for name in ("is_decoder", "causal"))
    if type(settings) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise UserError(
            f"{given} is a '{kind}', an encoder, in which each token sees those after it; give a causal language model"
        )


def _text_only(settings: PreTrainedConfig, source: str) -> str:
    """How to come to the part of a checkpoint that is a language model."""
    text = settings.get_text_config()
    if type(text) is type(settings) or causal_class(text) is None:
        return "give a causal language model"
    code = TEXT_ONLY.get(settings.model_type)
    if code is None:
        return f"its text part alone would be a '{text.model_type}': give a checkpoint of that kind"
    imported = "AutoModelForCausalLM" + (", AutoModelForImageTextToText" if "ImageText" in code else "")
    return (
        f"its text part alone is a '{text.model_type}': save that by `python -c \"from transformers import {imported}; "
        f'{code.format(source=source)}"`, and give model.path=text-only with model.tokenizer={source}'
    )


def settings_read_by(settings: PreTrainedConfig) -> set[str]:
    """The names of settings that a config declares, under their other names too, or that the model's code reads.

    Some families read what their config does not declare, such as the `head_dim` of Qwen3-MoE.
    """
    names = set(type(settings)().to_dict()) | set(settings.attribute_map)
    made = causal_class(settings)
    if made is None:
        return names
    code = inspect.getsource(inspect.getmodule(made))
    return names | {name for pair in re.findall(r'config, "(\w+)"|config\.(\w+)', code) for name in pair if name}


def check_code(source: str, revision: str | None) -> None:
    """Make sure that trusted code of a checkpoint is known: that it stands beside it.

    The code in a folder on this machine is what stands there. That of a Hub checkpoint is known by the commit of
    `model.revision`, which says nothing of code that is taken from another repository.

    Args:
        source: a folder or a Hub id.
    Raises:
        UserError: code would be taken from another repository.
    """
    found = (_config_of(source, revision), get_tokenizer_config(source, revision=revision))
    names = [name for part in found for name in _names_in(part.get("auto_map"))]
    elsewhere = sorted({name.split("--")[0] for name in names if "--" in name})
    if elsewhere:
        raise UserError(
            f"{source} takes its code from another repository, {', '.join(elsewhere)}, where it may change any day; "
            "save a copy whose code stands beside it and give that folder as model.path"
        )


def refuse_own_code(source: str, revision: str | None) -> None:
    """Say what a checkpoint needs that could not be read without running code of its own, if that is so.

    Raises:
        UserError: it is of a kind that transformers does not have, and brings code for it.
    """
    found = _config_of(source, revision)
    if found.get("auto_map") and found.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"model.path={source} brings code of its own for '{found.get('model_type')}', which transformers does not "
            "have; read that code, and if it may run here, set model.trust_remote_code=true, and for a Hub id "
            "model.revision to the full hash of the commit that you have read"
        )


def _config_of(source: str, revision: str | None) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    except (OSError, ValueError):
        return {}  # there is none, which whoever loads it tells


def _names_in(value: Any) -> list[str]:
    """The classes that an `auto_map` names: texts in dicts and lists."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [name for part in parts for name in _names_in(part)]
