"""Texts of messages that hold the text of a special token, read as plain text.

content = ContentEncoder.of(tokenizer, backend)
content.encode(chat.text, chat.contents, special_token, origin).ids   # no "<|im_end|>" but the template's own
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers
from transformers import PreTrainedTokenizerBase

from src.refusal import Refusal, RowRefusedError
from src.token_spans import OffsetTokens, Stretch


@dataclass(frozen=True)
class ContentEncoder:
    """A tokenizer that reads special tokens only where the template wrote them.

    Between two special tokens a tokenizer encodes the text by itself; so do we, with `plain`, to which their text
    means nothing. `tokens` are the special tokens by their text.
    """

    backend: tokenizers.Tokenizer
    tokens: dict[str, tuple[int, tokenizers.AddedToken]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, backend: tokenizers.Tokenizer) -> "ContentEncoder":
        """Prepare `backend`, the tokenizer's own model without its post-processor."""
        return cls(
            backend, {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        )

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without special tokens. A copy of 150,000 tokens takes 0.6 s, and few data need it."""
        plain = copy.deepcopy(self.backend)
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def even(self) -> bool:
        """Whether text is encoded alike at the start of a row and after a special token."""
        special = next((text for text, (_, token) in self.tokens.items() if token.special and not token.rstrip), None)
        after = self.backend.encode(f"{special}a b", add_special_tokens=False).ids[1:] if special else None
        return special is None or after == self.plain.encode("a b", add_special_tokens=False).ids

    def encode(
        self, text: str, contents: Sequence[tuple[int, int]], special_token: re.Pattern[str], origin: str
    ) -> OffsetTokens:
        """Encode a rendered conversation.

        Args:
            contents: characters of the messages' own texts, as (start, end), in order.
            special_token: matches the text of any special token.
        Raises:
            RowRefusedError: the tokenizer reads a text after a special token in another way than at a row's start, so
                that it cannot be encoded apart.
        """
        if not self.even:
            reason = (
                f"{origin} holds the text of a special token, which this tokenizer cannot read as plain text; change "
                "the row, or set data.allow_special_tokens_in_content=true to train on the token itself"
            )
            raise RowRefusedError(Refusal(origin, "unaligned", reason))
        starts = [start for start, _ in contents]
        ids: list[int] = []
        offsets: list[Stretch] = []
        position, after_strip = 0, False
        while True:
            found = self._next_of_template(text, position, contents, starts, special_token)
            until = found.start() if found else len(text)
            number, token = self.tokens[found.group()] if found else (None, None)
            run = text[position:until]
            if after_strip:
                position += len(run) - len(run.lstrip())
                run = run.lstrip()
            if token is not None and token.lstrip:
                run = run.rstrip()
            encoded = self.plain.encode(run, add_special_tokens=False)
            ids += encoded.ids
            offsets += [(position + start, position + end) for start, end in encoded.offsets]
            if found is None:
                return OffsetTokens.at(ids, offsets)
            ids.append(number)
            offsets.append(found.span())
            position, after_strip = found.end(), token.rstrip

    @staticmethod
    def _next_of_template(
        text: str,
        position: int,
        contents: Sequence[tuple[int, int]],
        starts: Sequence[int],
        special_token: re.Pattern[str],
    ) -> re.Match[str] | None:
        """The next special token that does not begin within a message's own text."""
        while (found := special_token.search(text, position)) is not None:
            within = bisect_right(starts, found.start()) - 1
            if within < 0 or contents[within][1] <= found.start():
                return found
            position = contents[within][1]
        return None
