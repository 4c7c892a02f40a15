"""A GGUF file's tokenizer as this project's, or as Hugging Face's files.

    tokenizer, generation, encode = from_metadata(content, vocab_size=32000)

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE

from src.checkpoints.checkpoint import Generation, MadeTokenizer
from src.checkpoints.gguf_files import Content
from src.checkpoints.gguf_steps import NAMED_STEPS, OTHER_NAMES
from src.checkpoints.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from src.checkpoints.pieces import ScoredPieces, repeated_pieces
from utils.errors import UserError, some

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_DEFAULT_IDS = {"llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}, "gpt2": {}}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def from_metadata(
    content: Content, vocab_size: int
) -> tuple[ScoredPieces | MadeTokenizer, Generation, Callable[[str], list[int]]]:
    """A file's tokenizer, the tokens that bound its texts, and the tokenization.

    Raises:
        UserError: it is damaged, of a kind or with steps that are not served, or of another size than `vocab_size`.
    """
    table = _Table.of(content, vocab_size)
    if table.model == "llama":
        pieces = _pieces(table)
        if not table.added and table.chat_template is None and (table.adds_begin, table.adds_end) == (True, False):
            return pieces, table.generation, pieces.encode
        backend = pieces.to_tokenizer()
    else:
        backend = _byte_level(table)
    _add_tokens(table, backend)
    return _made(table, backend), table.generation, lambda text: backend.encode(text).ids


@dataclass(frozen=True)
class _Table:
    """What a file says of its tokenizer."""

    content: Content
    model: str
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]
    """Of special tokens, by GGUF's keys."""

    @classmethod
    def of(cls, content: Content, vocab_size: int) -> "_Table":
        model = content.value("tokenizer.ggml.model", str)
        if model not in _DEFAULT_IDS:
            raise UserError(
                f"{content.path}: tokenizer.ggml.model={model} is not served, only {', '.join(_DEFAULT_IDS)}"
            )
        tokens = _list_of(content, "tokens", str)
        if len(tokens) != vocab_size:
            raise UserError(
                f"{content.path} has {len(tokens)} tokens, but its embedding {vocab_size} rows; convert it again from "
                "the model's own files"
            )
        if repeated := repeated_pieces(tokens):
            raise UserError(f"{content.path} has tokens under several ids: {some(repeated.items())}; convert it again")
        has_kinds = "tokenizer.ggml.token_type" in content.metadata
        kinds = _list_of(content, "token_type", int) if has_kinds else [NORMAL] * len(tokens)
        if len(kinds) != len(tokens):
            raise UserError(f"{content.path} has {len(kinds)} token types for {len(tokens)} tokens; convert it again")
        ids = dict(_DEFAULT_IDS[model])
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            key = f"{role}_token_id"
            index = content.metadata.get(f"tokenizer.ggml.{key}")
            if index is not None and not (type(index) is int and 0 <= index < len(tokens)):
                raise UserError(f"{content.path}: tokenizer.ggml.{key}={index} is none of its {len(tokens)} tokens")
            ids |= {} if index is None else {key: index}
        for key in ("tokenizer.ggml.pre", "tokenizer.chat_template"):
            if key in content.metadata:
                content.value(key, str)
        return cls(content, model, tokens, kinds, ids)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.content.metadata.get(f"tokenizer.ggml.{key}", default))

    @property
    def pre(self) -> str:
        """llama.cpp's name of the steps before joining."""
        name = self.content.metadata.get("tokenizer.ggml.pre", "default")
        return OTHER_NAMES.get(name, name)

    @property
    def adds_begin(self) -> bool:
        return "bos_token_id" in self.ids and self.flag(
            "add_bos_token", self.model == "llama" or self.pre == "llama-bpe"
        )

    @property
    def adds_end(self) -> bool:
        return "eos_token_id" in self.ids and self.flag("add_eos_token", False)

    @property
    def chat_template(self) -> str | None:
        return self.content.metadata.get("tokenizer.chat_template")

    @property
    def added(self) -> dict[int, str]:
        """The tokens that are matched as a whole, by id, but for a SentencePiece's own three."""
        own = {self.ids.get(key) for key in ("bos_token_id", "eos_token_id", "unknown_token_id")}
        own = own if self.model == "llama" else set()
        return {
            index: token
            for index, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED) and index not in own
        }

    def is_padding(self, index: int) -> bool:
        """Whether no text ever gives the token, as it only stands for a row of the embedding."""
        return self.kinds[index] == UNUSED and self.tokens[index] == f"[PAD{index}]"

    @property
    def generation(self) -> Generation:
        stops = tuple(dict.fromkeys(self.ids[key] for key in _STOPS if key in self.ids))
        return Generation(self.ids.get("bos_token_id"), stops, self.ids.get("padding_token_id"))


def _list_of(content: Content, key: str, kind: type) -> list[Any]:
    """Raises: UserError if the list under a key of the tokenizer is absent or holds something else than `kind`."""
    values = content.value(f"tokenizer.ggml.{key}", list)
    if not all(isinstance(value, kind) for value in values):
        raise UserError(f"{content.path}: tokenizer.ggml.{key} is no list of {kind.__name__}; convert it again")
    return values


def _pieces(table: _Table) -> ScoredPieces:
    """The pieces of a SentencePiece BPE, without what follows the last of them."""
    path, kinds = table.content.path, table.kinds
    if not table.flag("add_space_prefix", True):
        raise UserError(f"{path}: tokenizer.ggml.add_space_prefix=false is not served, only true")
    scores = _list_of(table.content, "scores", float)
    own = [index for index, kind in enumerate(kinds) if kind in (NORMAL, UNKNOWN, BYTE)]
    first_byte = kinds.index(BYTE) if BYTE in kinds else -1
    if first_byte < 0 or table.tokens[first_byte : first_byte + 256] != _BYTES or len(scores) != len(table.tokens):
        raise UserError(f"{path} lacks scores or the pieces of the 256 bytes in order; convert it again")
    end = max(own) + 1
    ids = [table.ids[key] for key in ("unknown_token_id", "bos_token_id", "eos_token_id")]
    return ScoredPieces(tuple(table.tokens[:end]), tuple(scores[:end]), *ids, first_byte)


def _byte_level(table: _Table) -> Tokenizer:
    """The tokenizer of a byte-level BPE, without the tokens that are matched as a whole."""
    path = table.content.path
    if table.pre not in NAMED_STEPS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre={table.pre} is not served, only {', '.join((*NAMED_STEPS, *OTHER_NAMES))}"
        )
    steps = NAMED_STEPS[table.pre]
    added = table.added
    vocabulary = {
        token: index for index, token in enumerate(table.tokens) if index not in added and not table.is_padding(index)
    }
    if sorted(added) != list(range(len(vocabulary), len(vocabulary) + len(added))):
        # Hugging Face numbers added tokens on from the vocabulary, so these keep their ids only within it.
        vocabulary |= {token: index for index, token in added.items()}
    merges = [tuple(merge.split(" ")) for merge in _list_of(table.content, "merges", str)]
    try:
        model = BPE(vocab=vocabulary, merges=merges, ignore_merges=steps.ignore_merges)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit its tokens ({error}); convert it again") from error
    described: dict[str, Any] = json.loads(Tokenizer(model).to_str())
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            dict(step) | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {})
            for step in steps.pre_tokenizers
        ],
    }
    described["normalizer"] = {"type": steps.normalizer} if steps.normalizer else None
    backend = Tokenizer.from_str(json.dumps(described))
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(table: _Table, backend: Tokenizer) -> None:
    """Add the tokens that are matched as a whole, and those put around a text."""
    for index, token in sorted(table.added.items()):
        special = table.kinds[index] == CONTROL
        (backend.add_special_tokens if special else backend.add_tokens)(
            [AddedToken(token, special=special, normalized=False)]
        )
        if backend.token_to_id(token) != index:
            raise UserError(
                f"{table.content.path}: the token {token!r} would not keep its id {index}; convert from the model's "
                "own files"
            )
    begin, end = (table.tokens[table.ids[key]] if key in table.ids else "" for key in ("bos_token_id", "eos_token_id"))
    around = [*([begin] if table.adds_begin else []), "$A", *([end] if table.adds_end else [])]
    used = {token: backend.token_to_id(token) for token in around if token != "$A"}
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{part}:0" for part in around],
        pair=[*(f"{part}:0" for part in around), *(f"{part}:1".replace("$A", "$B") for part in around)],
        special_tokens=list(used.items()),
    )


def _made(table: _Table, backend: Tokenizer) -> MadeTokenizer:
    """The tokenizer in Hugging Face's files; see `hf` for the class."""
    roles = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": table.tokens[table.ids[key]] for role, key in roles.items() if key in table.ids},
        "clean_up_tokenization_spaces": False,
    }
    texts = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    return MadeTokenizer(texts | ({"chat_template.jinja": table.chat_template} if table.chat_template else {}))
