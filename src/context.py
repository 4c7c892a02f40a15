"""How many tokens a model sees at once, and how rotary positions are scaled for more.

    scale_context(settings, {"rope_type": "yarn", "factor": 4.0})
    context_length(settings)

A scaled config says so in its `rope_parameters`, which `save_pretrained` writes and every program that loads the model
reads. Models with learned positions cannot be scaled.

Source: linear arXiv:2306.15595, yarn arXiv:2309.00071, llama3 https://arxiv.org/abs/2407.21783 section 3.4.2.
"""

from typing import Any

from transformers import PreTrainedConfig

from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

ORIGINAL = "original_max_position_embeddings"
"""The context that a model had before it was scaled, in its rope_parameters."""

OLD_CONTEXT_KINDS = ("yarn", "llama3")
"""Kinds of scaling whose frequencies depend on the context before it."""

LLAMA3_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What Llama 3.1 and 3.2 have."""


def context_length(settings: PreTrainedConfig) -> int | None:
    """The tokens that a model was made to see at once in training, or None where its config does not say.

    `dynamic` scaling counts for generation only; see `generation_length`.
    """
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def generation_length(settings: PreTrainedConfig) -> int | None:
    """The tokens of a prompt and its answer that a model can see, or None where its config does not say."""
    context, own = context_length(settings), _rotations(settings)
    if context is not None and own and own.get("rope_type") == "dynamic":
        return int(context * own["factor"])
    return context


def longer_context(settings: PreTrainedConfig, max_length: int) -> str:
    """How a model's context becomes `max_length`, as a piece of an error's advice; empty where it cannot."""
    context, own = context_length(settings), _rotations(settings)
    if context is None or not own or own.get("rope_type", "default") != "default":
        return ""
    return f", or give model.rope_scaling={{rope_type: yarn, factor: {-(-max_length // context)}}}"


def check_length(settings: PreTrainedConfig, max_length: int) -> None:
    """
    Raises:
        UserError: rows of `max_length` tokens are longer than the model's context.
    """
    context, own = context_length(settings), _rotations(settings)
    if context is None or max_length <= context:
        return
    dynamic = ""
    if own and own.get("rope_type") == "dynamic":
        dynamic = (
            " (rope_type=dynamic turns all rows of a batch by its longest one, so it cannot be trained above that; "
            "linear, yarn and llama3 can)"
        )
    raise UserError(
        f"data.max_length={max_length} exceeds the model's context of {context} tokens{dynamic}; lower it to {context} "
        f"or less{longer_context(settings, max_length)}"
    )


def scale_context(settings: PreTrainedConfig, scaling: dict[str, Any]) -> None:
    """Write `model.rope_scaling` into a model's config; nothing changes where it is empty or what the model has.

    Args:
        scaling: checked by `config.model_constraints`.
    Raises:
        UserError: the model has no rotary positions, or a scaling of its own that contradicts this one.
    """
    if not scaling:
        return
    text, own = settings.get_text_config(), _rotations(settings)
    if own is None:
        raise UserError(
            f"model.rope_scaling needs rotary positions, and {text.model_type} has none; leave it out and keep to "
            f"its context of {context_length(settings)} tokens"
        )
    if any(isinstance(value, dict) for value in own.values()):
        raise UserError(
            f"model.rope_scaling sets one scaling, and {text.model_type} turns each kind of layer in its own way; "
            "leave it out"
        )
    kind, factor, context = scaling["rope_type"], float(scaling["factor"]), context_length(settings)
    before = own.get("rope_type", "default")
    original = _original_context(own, context)
    if before not in ("default", kind):
        raise UserError(
            f"model.rope_scaling.rope_type={kind} contradicts the model, which was made with rope_type={before} "
            f"(factor {own.get('factor')}, context {context}); leave out model.rope_scaling, or give rope_type={before}"
        )
    if before == kind and factor < own["factor"]:
        raise UserError(
            f"model.rope_scaling.factor={factor} would shorten the context of {context} tokens, which the model has by "
            f"a factor of {own['factor']}; give that or more, or leave out model.rope_scaling"
        )
    others = {name: value for name, value in scaling.items() if name not in ("rope_type", "factor")}
    known = own if before == kind else {}
    for name, value in others.items():
        has = original if name == ORIGINAL else known.get(name)
        if has is not None and has != value:
            raise UserError(
                f"model.rope_scaling.{name}={value} contradicts the model, which has {has}; leave it out, or give {has}"
            )
    if before == kind and factor == own["factor"]:
        return
    _write(text, known, scaling, original)
    log.info(
        "rotary positions are scaled by %s with a factor of %g: the context is %d tokens, from %d",
        kind,
        factor,
        generation_length(settings),
        original,
    )


def _write(text: PreTrainedConfig, known: dict[str, Any], scaling: dict[str, Any], original: int) -> None:
    """Put a scaling and the context that it gives into a config, after what the model knows of such scaling."""
    kind, factor = scaling["rope_type"], float(scaling["factor"])
    kept = {name: text.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor") if _has(text, name)}
    parameters = kept | (LLAMA3_FACTORS if kind == "llama3" else {}) | known | scaling | {"factor": factor}
    parameters.pop(ORIGINAL, None)
    if kind in OLD_CONTEXT_KINDS:
        parameters[ORIGINAL] = original
    if kind != "dynamic":  # whose frequencies are told from the context before it
        text.max_position_embeddings = int(original * factor)
    text.rope_parameters = parameters


def _has(text: PreTrainedConfig, name: str) -> bool:
    return text.rope_parameters.get(name) is not None


def _original_context(own: dict[str, Any], context: int) -> int:
    """The context before any scaling."""
    if own.get(ORIGINAL) is not None:
        return own[ORIGINAL]
    return round(context / own["factor"]) if own.get("rope_type") == "linear" else context


def _rotations(settings: PreTrainedConfig) -> dict[str, Any] | None:
    """The model's rope_parameters, or None where it has no rotary positions."""
    return getattr(settings.get_text_config(), "rope_parameters", None) or None
