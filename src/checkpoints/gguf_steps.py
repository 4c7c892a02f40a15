"""What byte-level BPE tokenizers do before they join, by the names that llama.cpp has for it.

llama.cpp splits a text by regular expressions that it knows by name, `tokenizer.ggml.pre`. The name is chosen here by
the steps of `tokenizer.json`; steps without a name are refused, as llama.cpp would tokenize otherwise.

    name_of_steps("tokenizer.json", content)   # "llama-bpe"

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class Steps:
    """What a byte-level BPE does before it joins."""

    pre_tokenizers: tuple[Mapping[str, Any], ...]
    """As in tokenizer.json, without `trim_offsets`, which moves no token."""
    ignore_merges: bool = False
    """Whether a part that is a token as a whole is that token, whatever the merges say."""
    normalizer: str | None = None


NAMED_STEPS = {
    "gpt-2": Steps((_byte_level(True),)),
    "smollm": Steps((_DIGITS, _byte_level(True))),
    "llama-bpe": Steps((_split(_LLAMA3), _byte_level(False)), ignore_merges=True),
    "dbrx": Steps((_split(_LLAMA3), _byte_level(False))),
    # llama.cpp normalizes nothing; the name tells a reader that the makers' tokenizer does.
    "qwen2": Steps((_split(_QWEN2), _byte_level(False)), normalizer="NFC"),
    "stablelm2": Steps((_split(_QWEN2), _byte_level(False))),
}
OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "dbrx"}
"""Names that llama.cpp reads as one of those above."""


def name_of_steps(file: str, content: Mapping[str, Any]) -> str:
    """llama.cpp's name of what a tokenizer does before it joins.

    Args:
        file: where the tokenizer stands, for the message.
        content: of tokenizer.json.
    Raises:
        UserError: it has none.
    """
    outer = content.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for step in steps:
        if step.get("type") == "ByteLevel":
            step.setdefault("use_regex", True)
    normalizer = content.get("normalizer")
    found = Steps(tuple(steps), bool(content["model"].get("ignore_merges")), normalizer["type"] if normalizer else None)
    for name, known in NAMED_STEPS.items():
        if found == known:
            if known.normalizer:
                log.warning("llama.cpp does not apply the tokenizer's normalizer %s", known.normalizer)
            return name
    raise UserError(
        f"{file}: normalizer={normalizer}, pre_tokenizer={steps} and ignore_merges={found.ignore_merges} have no name "
        f"here that llama.cpp knows, only those of {', '.join(NAMED_STEPS)}; choose another --to"
    )
