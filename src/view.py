"""Token rows as a person reads them: pieces of text, which of them are supervised, and where each turn begins.

    viewer = RowViewer(tokenizer)
    row = viewer.view(data.train[0]["input_ids"], data.train[0]["labels"])
    [(piece.text, piece.supervised) for piece in row.pieces]     # [("<|im_start|>", False), ("user", False), ...]
    row.turns                                                    # [Turn(first=0, role="user"), ...]

The text is decoded from the very ids and labels that training gets. Tokens that are parts of one character stand
together; bytes that are no character, as where a row is cut within one, are written out, such as `\\xe2\\x82`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from src.token_bytes import BYTE_PIECE, byte_alphabet
from src.tokenization import IGNORED

PieceKind = Literal["text", "special", "bytes"]
"""`special`: a token that the tokenizer knows by name, such as `<|im_end|>`; `bytes`: a part of a character alone."""

ROLES = frozenset(
    {
        *("system", "developer", "user", "human", "assistant", "model", "gpt", "bot", "chatbot"),
        *("tool", "ipython", "function", "observation", "environment"),
    }
)
"""Names that chat templates give to speakers."""

TOKENS_OF_ROLES = {"inst": "user", "/inst": "assistant", "tool results": "tool", "system prompt": "system"}
"""Special tokens that begin a turn and name it otherwise, such as [INST], in lower case without brackets."""

ROLE_OF_A_CALL = re.compile(r"assistant to=\S|functions\.\S")
"""How a template may write who calls a tool, and which tool answers."""

HEADER_PIECES = 80
"""Most pieces between the special token that begins a turn and the end of the turn's role."""

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes to where bytes are no character."""

BYTE_OF = byte_alphabet()
"""The byte that each letter of a byte-level vocabulary stands for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token, or of several that are one character; all of its ids are supervised, or none."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    kind: PieceKind = "text"


@dataclass(frozen=True)
class Turn:
    """Where a turn begins, as the number of its first piece, and whose it is, as the template names it."""

    first: int
    role: str


@dataclass(frozen=True)
class ViewedRow:
    """A row as pieces, and its turns in order; what stands before the first of them, such as BOS, is of none."""

    pieces: list[Piece]
    turns: list[Turn]

    def tokens(self) -> int:
        """The number of the row's tokens."""
        return sum(len(piece.ids) for piece in self.pieces)

    def supervised_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)


class RowViewer:
    """Decodes rows of one tokenizer token by token; what it has decoded once it knows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        # A tokenizer may name runs of white space as it names <|im_end|>; they are read as text.
        self.special = {number: content for number, content in added.items() if content.strip()}
        # Some decoders drop a row's first space, so that a token is decoded after another one.
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.text_before = self._decode(self.before)
        self.known: dict[tuple[int, bool], Piece | None] = {}

    def view(self, ids: Sequence[int], labels: Sequence[int]) -> ViewedRow:
        """A row's pieces and turns.

        Args:
            ids: tokens, each with its label of the same place in `labels`, -100 where it is not supervised.
        """
        pieces: list[Piece] = []
        part: list[int] = []
        inside = False  # whether `part`, the tokens of a character that is not whole, is supervised
        for number, label in zip(ids, labels, strict=True):
            supervised = label != IGNORED
            known = self._piece(number, supervised)
            if part and (known is not None or supervised != inside):
                pieces.append(self._bytes_piece(part, inside))
                part = []
            if known is not None:
                pieces.append(known)
                continue
            inside = supervised
            self._add_part(number, part, inside, pieces)
        if part:
            pieces.append(self._bytes_piece(part, inside))
        return ViewedRow(pieces, find_turns(pieces))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _piece(self, number: int, supervised: bool) -> Piece | None:
        """The piece that a token is by itself; None for one that holds a part of a character."""
        key = number, supervised
        if key not in self.known:
            self.known[key] = self._new_piece(number, supervised)
        return self.known[key]

    def _new_piece(self, number: int, supervised: bool) -> Piece | None:
        if number in self.special:
            return Piece(self.special[number], (number,), supervised, "special")
        text = self._decode([*self.before, number]).removeprefix(self.text_before)
        if REPLACEMENT in text and self._bytes([number]) is not None:
            return None
        if not text:  # such as an id of no token, or a token that the decoder drops
            return Piece(f"<{number}>", (number,), supervised, "special")
        return Piece(text, (number,), supervised)

    def _add_part(self, number: int, part: list[int], supervised: bool, pieces: list[Piece]) -> None:
        """Put a part of a character to those before it, and to `pieces` what is whole now, or never will be."""
        part.append(number)
        try:
            text = self._bytes(part).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return
            if len(part) > 1:
                pieces.append(self._bytes_piece(part[:-1], supervised))
                part.clear()
                self._add_part(number, part, supervised, pieces)
                return
            pieces.append(self._bytes_piece(part, supervised))
        else:
            pieces.append(Piece(text, tuple(part), supervised))
        part.clear()

    def _bytes_piece(self, part: Sequence[int], supervised: bool) -> Piece:
        return Piece(self._bytes(part).decode(errors="backslashreplace"), tuple(part), supervised, "bytes")

    def _bytes(self, ids: Sequence[int]) -> bytes | None:
        """The bytes that tokens spell; None if one of them spells characters."""
        found = b""
        for token in self.tokenizer.convert_ids_to_tokens(list(ids)):
            match = BYTE_PIECE.fullmatch(token)
            if match:
                found += bytes.fromhex(match[1])
            elif all(character in BYTE_OF for character in token):
                found += bytes(BYTE_OF[character] for character in token)
            else:
                return None
        return found


def find_turns(pieces: Sequence[Piece]) -> list[Turn]:
    """The turns of a row, told from its tokens alone.

    A turn begins at a special token that names a role, or that a role follows; of the latter there is one in a
    template, so that a message which begins with the name of a role begins no turn. In a row without such tokens, as of
    a template that writes roles as plain text, a supervised run is a turn, and so is what stands between two of them.
    """
    turns = []
    opening = None
    for at, piece in enumerate(pieces):
        if piece.kind != "special":
            continue
        role = _role_in(piece.text)
        if role is None and opening in (None, piece.text):
            role = _role_after(pieces, at)
            opening = piece.text if role is not None else opening
        if role is not None:
            turns.append(Turn(at, role))
    return turns or _runs(pieces)


def _role_in(token: str) -> str | None:
    """The role that a special token names: `user` of <|user|>, <｜User｜>, <|USER_TOKEN|> or [INST]."""
    words = re.sub(r"[^a-z/]+", " ", token.lower()).split()
    name = " ".join(words[:-1] if words[-1:] == ["token"] else words)
    return name if name in ROLES else TOKENS_OF_ROLES.get(name)


def _role_after(pieces: Sequence[Piece], at: int) -> str | None:
    """The role that stands between a special token and a line feed or the next special token."""
    text = ""
    for piece in pieces[at + 1 : at + 1 + HEADER_PIECES]:
        ends_header = piece.kind == "special"
        text += "" if ends_header else piece.text
        if ends_header or "\n" in text:
            role = text.split("\n")[0].strip()
            return role if role.lower() in ROLES or ROLE_OF_A_CALL.match(role) else None
    return None


def _runs(pieces: Sequence[Piece]) -> list[Turn]:
    states = [piece.supervised for piece in pieces]
    if len(set(states)) < 2:
        return []
    borders = [at for at in range(len(states)) if at == 0 or states[at] != states[at - 1]]
    return [Turn(at, "supervised" if states[at] else "not supervised") for at in borders]
