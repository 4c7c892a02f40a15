"""A transformers config for a model that starts from random weights.

    settings = settings_from({"size": "gpt2-124m", "n_layer": 6}, tokenizer)

The weights are then drawn by the model's own rule (`_init_weights` of its class in transformers), on the CPU of every
process alike, so that a seed gives the same weights on any number of devices.
"""

import difflib
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from config.architectures import expanded
from src.chat_setup import ROWS_MULTIPLE, in_multiples, vocabulary_size
from src.families import settings_read_by
from utils.errors import UserError, in_one_line
from utils.logging import get_logger

log = get_logger(__name__)

USED_SHARE = 0.9
"""Share of a named size's vocabulary that a tokenizer uses at least, or the rows to spare are told."""


def settings_from(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config that `model.architecture` describes, with a vocabulary for the tokenizer.

    Raises:
        UserError: the kind of model or one of its settings is unknown or does not suit it, or `vocab_size` is below
            the tokenizer's.
    """
    fields = expanded(architecture)
    kind = fields.pop("model_type")
    fields["vocab_size"] = _vocabulary(architecture, fields.get("vocab_size"), vocabulary_size(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    try:
        settings = AutoConfig.for_model(kind, **fields)
    except StrictDataclassError as error:
        raise UserError(f"model.architecture does not suit '{kind}': {in_one_line(error)}") from error
    except ValueError as error:
        if kind in CONFIG_MAPPING:
            raise UserError(f"model.architecture does not suit '{kind}': {in_one_line(error)}") from error
        near = difflib.get_close_matches(kind, CONFIG_MAPPING, n=3) or ["llama"]
        raise UserError(
            f"model.architecture.model_type={kind} is not one that transformers knows; did you mean "
            f"{' or '.join(near)}?"
        ) from error
    known = settings_read_by(settings)
    unknown = sorted(set(fields) - known)
    if unknown:
        near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
        raise UserError(
            f"model.architecture has settings that '{kind}' does not know: "
            + "; ".join(f"{name}" + (f" (did you mean {match[0]}?)" if match else "") for name, match in near.items())
        )
    return settings


def _vocabulary(architecture: dict[str, Any], rows: int | None, tokens: int) -> int:
    """Rows of the embeddings: those given, else those of the named size if they suffice, else the tokenizer's."""
    if rows is None:
        return tokens
    if "vocab_size" in architecture:
        if rows < tokens:
            raise UserError(
                f"model.architecture.vocab_size={rows} is below the {tokens} tokens of the tokenizer; raise it, or "
                "leave it out"
            )
        return rows
    if rows < tokens:
        grown = in_multiples(tokens, ROWS_MULTIPLE)
        log.info("%s has %d tokens and the tokenizer %d: %d rows are made", architecture["size"], rows, tokens, grown)
        return grown
    if tokens < USED_SHARE * rows:
        log.warning(
            "%s has %d rows in its embeddings, of which the tokenizer uses %d; model.architecture.vocab_size=%d makes "
            "no more than those",
            architecture["size"],
            rows,
            tokens,
            in_multiples(tokens, ROWS_MULTIPLE),
        )
    return rows
