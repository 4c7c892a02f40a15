"""Where tokens are in their texts, told by the bytes that each token of a vocabulary stands for.

    table = TokenBytes.of(backend)                         # None: a tokenizer of another kind
    [tokens] = table.place([text], [backend.encode(text).ids])
    tokens.borders                                         # bytes before each token; tokens is None: not proved

Offsets cost a tokenizer about a fifth more time than ids alone. But a token of a byte-level or a SentencePiece-like
tokenizer stands for known bytes, and sums of their lengths are the borders of a row's tokens. That is proved for each
row: its tokens' bytes, set end to end, must be its text. Where they are not (characters that the tokenizer composes or
drops, white space that a special token takes in, a text with `▁` of its own), the row is left to the offsets.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers.models import BPE

from src.token_spans import ByteTokens

SPACE = "▁"
"""The mark of a space in the tokens of SentencePiece (U+2581)."""

NO_TEXT = b"\xff"
"""Stands for tokens without bytes of their own; UTF-8 never has this byte, so no row with such a token is proved."""

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

Lead = Literal["", "row", "part"]
"""Where a tokenizer puts a space that the text has not: nowhere, before a row, or also after each special token."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of a vocabulary of V tokens.

    `joined` holds those of all tokens end to end, uint8; `starts` and `sizes`, (2V,), say where each token's are. The
    second half is for a token that a put space was read into, and lacks that space. `parts`, (V,), marks the special
    tokens, between which the tokenizer reads the text part by part.
    """

    joined: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    parts: np.ndarray
    lead: Lead

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "TokenBytes | None":
        """The table of a tokenizer; None where its decoder is neither byte-level nor SentencePiece's."""
        steps = _steps(backend)
        bytes_of = _reader(steps["decoder"])
        if bytes_of is None:
            return None
        vocabulary = backend.get_vocab(with_added_tokens=True)
        pieces = [NO_TEXT] * (max(vocabulary.values(), default=0) + 1)
        for token, number in vocabulary.items():
            pieces[number] = bytes_of(token)
        parts = np.zeros(len(pieces), dtype=bool)
        for number, added in backend.get_added_tokens_decoder().items():
            pieces[number] = added.content.encode()
            parts[number] = not added.normalized
        pieces += [piece[1:] if piece.startswith(b" ") else NO_TEXT for piece in pieces]
        sizes = np.fromiter(map(len, pieces), dtype=np.int64)
        return cls(np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(sizes) - sizes, sizes, parts, _lead(steps))

    def place(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[ByteTokens | None]:
        """Find where the tokens of texts are.

        Args:
            ids: the tokens of each text, without any that a post-processor adds.
        Returns:
            The tokens of each text; None where their bytes are not the text's.
        """
        rows = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in ids], out=rows[1:])
        flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32, count=rows[-1])
        keys = flat + len(self.parts) * self._after_put_space(flat, rows) if self.lead else flat
        sizes = self.sizes[keys]
        borders = np.zeros(len(flat) + 1, dtype=np.int64)
        np.cumsum(sizes, out=borders[1:])
        places = np.repeat((self.starts[keys] - borders[:-1]).astype(np.int32), sizes)
        places += np.arange(len(places), dtype=np.int32)
        read, edges, rows = self.joined[places].tobytes(), borders[rows].tolist(), rows.tolist()
        return [
            ByteTokens(flat[first:last], borders[first : last + 1]) if read[start:end] == text.encode() else None
            for text, first, last, start, end in zip(texts, rows, rows[1:], edges, edges[1:], strict=False)
        ]

    def _after_put_space(self, flat: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which tokens begin with a space that the tokenizer put there, as bool (tokens,)."""
        leads = np.zeros(len(flat) + 1, dtype=bool)
        if self.lead == "part":
            leads[1:] = self.parts[flat]
        leads[rows] = True
        return leads[:-1] & ~self.parts[flat]


def _steps(backend: tokenizers.Tokenizer) -> dict[str, list[dict[str, Any]]]:
    """The single steps of a tokenizer's normalizer, pre-tokenizer and decoder, as its JSON describes them."""
    names = ("normalizer", "pre_tokenizer", "decoder")
    bare = tokenizers.Tokenizer(BPE())  # without the vocabulary, whose JSON takes long to read
    for name in names:
        if getattr(backend, name) is not None:
            setattr(bare, name, getattr(backend, name))
    described = json.loads(bare.to_str())
    return {name: list(_flat(described[name])) for name in names}


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    inner = next((step[name] for name in ("normalizers", "pretokenizers", "decoders") if name in step), None)
    return [step] if inner is None else [each for part in inner for each in _flat(part)]


def _reader(decoder: Sequence[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """What tells the bytes of a token of the vocabulary; None for other decoders than the two kinds."""
    kinds = {step["type"] for step in decoder}
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        return lambda token: bytes(alphabet.get(letter, NO_TEXT[0]) for letter in token)
    if "Metaspace" in kinds or {"type": "Replace", "pattern": {"String": SPACE}, "content": " "} in decoder:
        return _bytes_of_piece
    return None


def _bytes_of_piece(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece) if piece.startswith("<0x") else None
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def byte_alphabet() -> dict[str, int]:
    """The letter that byte-level vocabularies write for each byte: itself where it can be seen, else one from 256 on.

    Source: GPT-2's encoder, https://github.com/openai/gpt-2/blob/9b63575ef42771a015060c964af2c3da4cf7c8ab/src/encoder.py
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


def _lead(steps: dict[str, list[dict[str, Any]]]) -> Lead:
    if any(step["type"] == "Prepend" and step["prepend"] == SPACE for step in steps["normalizer"]):
        return "part"
    schemes = {step.get("prepend_scheme") for step in steps["pre_tokenizer"] if step["type"] == "Metaspace"}
    return "part" if "always" in schemes else "row" if "first" in schemes else ""
