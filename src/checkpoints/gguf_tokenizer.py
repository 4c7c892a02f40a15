"""A checkpoint's tokenizer as GGUF's metadata: SentencePiece's scored pieces (`llama`) or byte-level BPE (`gpt2`).

    metadata = to_metadata(checkpoint, vocab_size=32000)
    metadata["tokenizer.ggml.model"]

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.checkpoints.checkpoint import Checkpoint, MadeTokenizer, TokenizerFiles
from src.checkpoints.gguf_steps import name_of_steps
from src.checkpoints.hf_tokenizer import made_tokenizer
from src.checkpoints.json_files import read_json_object
from src.checkpoints.pieces import ScoredPieces, pieces_of_content, repeated_pieces
from utils.errors import UserError, some
from utils.logging import get_logger

log = get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""
_ADDED_SCORE = -1000.0  # of tokens that are matched as a whole and never joined

_END_OF_MESSAGE = "<|eom_id|>"


def to_metadata(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Any]:
    """A checkpoint's tokenizer by GGUF's keys.

    Args:
        vocab_size: rows of the embedding; rows that no token stands for get `[PAD<id>]`.
    Raises:
        UserError: the tokenizer is of another kind, has more tokens than `vocab_size`, or a step or token that
            llama.cpp does not have; it is named.
    """
    tokenizer = checkpoint.tokenizer
    template = None
    if isinstance(tokenizer, ScoredPieces):
        values, named = _of_pieces(tokenizer, {}), _names_of_pieces(tokenizer)
    else:
        parts = _Parts.of(tokenizer if isinstance(tokenizer, TokenizerFiles) else made_tokenizer(checkpoint))
        template = parts.chat_template
        values, named = parts.vocabulary(), parts.named
    tokens = values["tokens"]
    if len(tokens) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokens)} tokens and the model vocab_size={vocab_size}; give the model's own "
            "tokenizer with --tokenizer, or resize its embedding"
        )
    if repeated := repeated_pieces(tokens):
        raise UserError(
            f"the tokenizer has tokens under several ids: {some(repeated.items())}; llama.cpp asks for one each"
        )
    missing = range(len(tokens), vocab_size)
    tokens += [f"[PAD{index}]" for index in missing]
    values["token_type"] += [UNUSED] * len(missing)
    if "scores" in values:
        values["scores"] += [_ADDED_SCORE] * len(missing)
    values |= _special_ids(checkpoint, named, tokens)
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | (
        {"tokenizer.chat_template": template} if template else {}
    )


@dataclass(frozen=True)
class _Parts:
    """What Hugging Face's files of a tokenizer say."""

    name: str
    """The file, for messages."""
    content: Mapping[str, Any]
    """Of tokenizer.json."""
    settings: Mapping[str, Any]
    """Of tokenizer_config.json."""
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: TokenizerFiles | MadeTokenizer) -> "_Parts":
        if isinstance(tokenizer, MadeTokenizer):
            texts = tokenizer.texts
            content, name = tokenizer.tokenizer_json, "the tokenizer"
            settings, template = json.loads(texts["tokenizer_config.json"]), texts.get("chat_template.jinja")
        else:
            path = tokenizer.tokenizer_json
            content, name = read_json_object(path), str(path)
            beside = {file.name: file for file in tokenizer.paths}
            config, jinja = beside.get("tokenizer_config.json"), beside.get("chat_template.jinja")
            settings = read_json_object(config) if config else {}
            template = _read_template(jinja) if jinja else settings.get("chat_template")
        if not isinstance(template, str | None):
            try:
                templates = {each["name"]: each["template"] for each in template}
            except (LookupError, TypeError) as error:
                raise UserError(f"{name}: chat_template is neither a text nor a list of named ones; mend it") from error
            log.warning("GGUF holds one chat template; of %s it gets `default`", sorted(templates))
            template = templates.get("default")
        parts = cls(name, content, settings, template)
        parts.check_added()
        return parts

    def vocabulary(self) -> dict[str, Any]:
        """Tokens, their kinds and how they are joined by GGUF's keys."""
        model = self.content["model"]
        if model.get("type", "BPE") == "BPE" and not model.get("byte_fallback"):
            return _of_bytes(self)
        return _of_pieces(pieces_of_content(self.name, self.content), self.added)

    @property
    def added(self) -> dict[int, tuple[str, bool]]:
        """The tokens that are matched as a whole, and whether they are special, by id."""
        return {token["id"]: (token["content"], token["special"]) for token in self.content["added_tokens"]}

    @property
    def named(self) -> dict[str, int]:
        """Ids by role: bos, eos, unk, pad."""
        ids = {text: index for index, (text, _) in self.added.items()} | dict(self.content["model"]["vocab"])
        found = {}
        for role in ("bos", "eos", "unk", "pad"):
            token = self.settings.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in ids:
                found[role] = ids[token]
        return found

    def check_added(self) -> None:
        """Raises: UserError for an added token that takes in what stands beside it."""
        for token in self.content["added_tokens"]:
            if odd := [name for name in ("single_word", "lstrip", "rstrip") if token.get(name)]:
                raise UserError(
                    f"{self.name}: the token {token['content']!r} sets {', '.join(odd)}, which gguf cannot hold; "
                    "choose another --to"
                )


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error


def _of_bytes(parts: _Parts) -> dict[str, Any]:
    """A byte-level BPE by GGUF's keys."""
    model = parts.content["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = {index: (token, NORMAL) for token, index in model["vocab"].items()}
    ids |= {index: (text, CONTROL if special else USER_DEFINED) for index, (text, special) in parts.added.items()}
    tokens = [ids.get(index, (f"[PAD{index}]", UNUSED)) for index in range(max(ids) + 1)]
    return {
        "model": "gpt2",
        "pre": name_of_steps(parts.name, parts.content),
        "tokens": [text for text, _ in tokens],
        "token_type": [kind for _, kind in tokens],
        "merges": merges,
    }


def _names_of_pieces(pieces: ScoredPieces) -> dict[str, int]:
    return {"bos": pieces.bos_id, "eos": pieces.eos_id, "unk": pieces.unk_id}


def _of_pieces(pieces: ScoredPieces, added: Mapping[int, tuple[str, bool]]) -> dict[str, Any]:
    """Scored pieces, and tokens that are matched as a whole, by GGUF's keys."""
    tokens, scores = list(pieces.pieces), list(pieces.scores)
    kinds = [NORMAL] * len(tokens)
    for index in sorted(added):
        if index > len(tokens):
            raise UserError(f"the added token {added[index][0]!r} has id {index}, but {len(tokens)} has none; fix ids")
        if index == len(tokens):
            tokens.append(added[index][0])
            scores.append(_ADDED_SCORE)
            kinds.append(NORMAL)
        kinds[index] = CONTROL if added[index][1] else USER_DEFINED
    for index in (pieces.bos_id, pieces.eos_id):
        kinds[index] = CONTROL
    kinds[pieces.unk_id] = UNKNOWN
    kinds[pieces.first_byte_id : pieces.first_byte_id + 256] = [BYTE] * 256
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [float(score) for score in scores],
        "token_type": kinds,
        "add_space_prefix": True,
    }


def _special_ids(checkpoint: Checkpoint, named: Mapping[str, int], tokens: list[str]) -> dict[str, Any]:
    """Ids of the tokens that bound a text, and whether they are put around one.

    The tokenizer's own end token comes first; GGUF has room for two more that end a text.
    """
    generation = checkpoint.generation
    begin = named.get("bos", generation.bos_token_id)
    stops = list(dict.fromkeys([*([named["eos"]] if "eos" in named else []), *generation.stop_token_ids]))
    others = sorted(stops[1:], key=lambda index: tokens[index] == _END_OF_MESSAGE)
    if len(others) > 2:
        raise UserError(
            f"generation.stop_token_ids={generation.stop_token_ids} cannot be held by gguf, which has room for three "
            "tokens that end a text; leave the others out of generation_config.json"
        )
    values = {
        "bos_token_id": begin,
        "eos_token_id": stops[0] if stops else None,
        "unknown_token_id": named.get("unk"),
        "padding_token_id": named.get("pad", generation.pad_token_id),
        **dict(zip(("eot_token_id", "eom_token_id"), others, strict=False)),
    }
    if len(others) == 1 and tokens[others[0]] == _END_OF_MESSAGE:
        values["eom_token_id"] = values.pop("eot_token_id")
    for key, index in values.items():
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f"{key}={index} is none of the {len(tokens)} tokens; fix generation_config.json")
    around = checkpoint.encode("a")
    return {key: index for key, index in values.items() if index is not None} | {
        "add_bos_token": begin is not None and around[:1] == [begin],
        "add_eos_token": bool(stops) and around[-1:] == stops[:1],
    }
