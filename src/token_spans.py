"""The tokens that stand for stretches of a text, such as its supervised turns.

    tokens = OffsetTokens.of(backend.encode(text))
    [(first, end, joined)] = tokens.spans(text, [(4, 9)], "rows.jsonl line 7")
    tokens.ids[first:end]                                  # what stands for text[4:9], and for nothing beside it

Where a token is, its offsets tell, or the bytes that it and those before it stand for (`src.token_bytes`). A token that
begins before a stretch is left out, though it reaches into it: when the model serves, its first part is already in the
prompt. That happens where content begins with white space that joins the template's own; the stretch is then `joined`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from src.refusal import Refusal, RowRefusedError

Stretch = tuple[int, int]
"""Characters of a text, as start and end."""

TokenSpan = tuple[int, int, bool]
"""The first token of a stretch, the end of its tokens, and whether a token before them reaches into it."""


@dataclass(frozen=True)
class OffsetTokens:
    """Tokens with the characters that each stands for; `ids` is int32, and `starts` and `ends` are int64 and rise."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, encoding: tokenizers.Encoding) -> "OffsetTokens":
        """The tokens of a text that was encoded with its offsets."""
        return cls.at(encoding.ids, encoding.offsets)

    @classmethod
    def at(cls, ids: Sequence[int], offsets: Sequence[Stretch]) -> "OffsetTokens":
        """Tokens at the given places."""
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return cls(np.array(ids, dtype=np.int32), places[:, 0], places[:, 1])

    def spans(self, text: str, stretches: Sequence[Stretch], origin: str) -> list[TokenSpan]:
        """The tokens of stretches of the text.

        Raises:
            RowRefusedError: a token stands for the end of a stretch and for more than white space after it.
        """
        return [self._span(text, start, end, origin) for start, end in stretches]

    def before(self, text: str, token: int, count: int) -> str:
        """What the last `count` tokens before a token stand for."""
        first = max(0, token - count)
        return text[self.starts[first] : self.ends[token - 1]] if token else ""

    def _span(self, text: str, start: int, end: int, origin: str) -> TokenSpan:
        first = int(self.ends.searchsorted(start, side="right"))  # passes over characters that the tokenizer drops
        last = int(self.ends.searchsorted(end - 1, side="right"))  # the first of those that share a character
        assert first < len(self.ids), f"{origin}: no token stands for a supervised span"
        assert last < len(self.ids), f"{origin}: no token stands for a stop token"
        assert self.starts[last] < end, f"{origin}: no token stands for a stop token"
        joined = bool(self.starts[first] < start)
        while self.starts[first] < start:
            first += 1
        reach = int(self.ends[last])
        if reach > end and text[end:reach].strip():
            reason = (
                f"{origin}: the tokenizer joins the end of {text[start:end][-40:]!r} with what the chat template "
                "writes after it; name its stop token in model.special_tokens"
            )
            raise RowRefusedError(Refusal(origin, "untrained_stop", reason))
        return first, last + 1, joined


@dataclass(frozen=True)
class ByteTokens:
    """Tokens that, set end to end, are their text: `ids` is int32, (tokens,); `borders` is int64, (tokens + 1,): where
    each begins, and the last ends, counted in bytes from any place.
    """

    ids: np.ndarray
    borders: np.ndarray

    def spans(self, text: str, stretches: Sequence[Stretch]) -> list[TokenSpan] | None:
        """The tokens of stretches of the text, which must rise; None where a token reaches beyond the end of one."""
        edges = [edge for stretch in stretches for edge in stretch]
        base = int(self.borders[0])
        places = [base + edge for edge in (edges if text.isascii() else _byte_places(text, edges))]
        tokens = self.borders.searchsorted(places)
        borders = self.borders[tokens].tolist()
        if borders[1::2] != places[1::2]:
            return None
        tokens = tokens.tolist()
        return [
            (first, end, border != place)
            for first, end, border, place in zip(tokens[::2], tokens[1::2], borders[::2], places[::2], strict=True)
        ]

    def before(self, text: str, token: int, count: int) -> str:
        """What the last `count` tokens before a token stand for; a character that begins before them is left out."""
        first, end = self.borders[[max(0, token - count), token]] - self.borders[0]
        return text.encode()[first:end].decode(errors="ignore")


def _byte_places(text: str, places: Sequence[int]) -> list[int]:
    """Where in the UTF-8 bytes of a text those characters begin; `places` rise."""
    found, done, size = [], 0, 0
    for place in places:
        size += len(text[done:place].encode())
        found.append(size)
        done = place
    return found
