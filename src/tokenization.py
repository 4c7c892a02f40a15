"""Token rows: conversations and texts as ids, with a label for each token that the loss counts.

    encoder = RowEncoder.of(tokenizer, supervise="assistant")
    rows = encoder.encode_conversations(conversations)   # each whole, of any length
    rows = encoder.encode_texts(texts, max_length=2048)  # each of at most max_length tokens

A label is the token's own id, or -100 where it is not supervised; labels are unshifted, as in Hugging Face models, and
the first of every row is -100, as no token comes before it. Every supervised span is read back and compared with the
rendered text before a row leaves this module.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tokenizers
from transformers import PreTrainedTokenizerBase

from src.chat import ChatTemplate, RenderedChat, refuse_without_stop, supervised_spans
from src.formats import Conversation, TextRow
from utils.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """One row: `labels` is as long as `input_ids`.

    `piece` counts a text's pieces from 0, and is 0 for a conversation; `joined_turns` counts the turns whose first
    white space is not supervised, because the tokenizer joins it with the template's own.
    """

    input_ids: list[int]
    labels: list[int]
    origin: str
    piece: int = 0
    joined_turns: int = 0

    def supervised_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into ids in batches, which the tokenizer's Rust threads share.

    `backend` is the tokenizer's own model without its post-processor: that one adds no token here, but may trim the
    white space from the offsets that tell where a token is. `template` is None if there are only texts.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: tokenizers.Tokenizer
    bos_id: int | None
    supervise: Literal["assistant", "all"]
    template: ChatTemplate | None

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, supervise: Literal["assistant", "all"], *, chat: bool = True
    ) -> "RowEncoder":
        """Prepare a tokenizer.

        Args:
            chat: whether conversations will be encoded, which needs a chat template.
        Raises:
            UserError: the tokenizer is not a fast one, or lacks the chat template.
        """
        template = ChatTemplate.of(tokenizer) if chat else None
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} does not tell where its tokens are; give a fast tokenizer (one with a "
                "tokenizer.json) as model.tokenizer"
            )
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.post_processor = None
        backend.encode_special_tokens = tokenizer.split_special_tokens
        backend.no_truncation()
        backend.no_padding()
        return cls(tokenizer, backend, tokenizer.bos_token_id, supervise, template)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[TokenRow]:
        """One row a conversation, uncut, each supervised span checked.

        Raises:
            UserError: the template or the tokenizer does not allow exact supervision of a row; it names the row.
        """
        if not conversations:
            return []
        if self.supervise == "assistant":
            chats = supervised_spans(self.template, conversations)
        else:
            chats = [RenderedChat(text, ()) for text in self.template.render(conversations)]
            for conversation, chat in zip(conversations, chats, strict=True):
                self._check_final_stop(conversation, chat.text)
        encodings = self.backend.encode_batch([chat.text for chat in chats], add_special_tokens=False)
        self._check_against_tokenizer(conversations[0], encodings[0].ids)
        rows: list[TokenRow] = []
        spans: list[_TokenSpan] = []
        for conversation, chat, encoding in zip(conversations, chats, encodings, strict=True):
            ids = encoding.ids
            self._check_bos(conversation, ids)
            found = [_token_span(encoding, chat.text, span, conversation.origin) for span in chat.spans]
            spans += found
            joined = sum(span.joined for span in found)
            rows.append(TokenRow(ids, self._labels(ids, found), conversation.origin, joined_turns=joined))
        self._check_spans(spans)
        return rows

    def _labels(self, ids: list[int], spans: Sequence["_TokenSpan"]) -> list[int]:
        if self.supervise == "all":
            return [IGNORED, *ids[1:]]
        labels = [IGNORED] * len(ids)
        for span in spans:
            labels[span.start : span.end] = span.ids
        labels[0] = IGNORED
        return labels

    def _check_against_tokenizer(self, conversation: Conversation, ids: list[int]) -> None:
        served = self.template.token_ids(conversation)
        assert ids == served, f"{conversation.origin}: the ids differ from those of apply_chat_template"

    def _check_bos(self, conversation: Conversation, ids: list[int]) -> None:
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            raise UserError(
                f"{conversation.origin}: the chat template writes {self.tokenizer.bos_token} twice at the start; take "
                "one of them out of the template, and give it as model.chat_template"
            )

    def _check_final_stop(self, conversation: Conversation, text: str) -> None:
        last = conversation.messages[-1]
        ending = text.rstrip()
        stops = [match.end() for match in self.template.stop_token.finditer(ending)]
        if last["role"] == "assistant" and (not stops or stops[-1] != len(ending)):
            refuse_without_stop(conversation, len(conversation.messages) - 1, text)

    def _check_spans(self, spans: Sequence["_TokenSpan"]) -> None:
        """Read every span back from its ids and compare it with the text that it stands for.

        Some tokenizers change text on purpose (they compose Unicode, put a space first, or lack a character); then the
        span alone must give the same text as it gives in its row.
        """
        read = self.backend.decode_batch([span.ids for span in spans], skip_special_tokens=False)
        for span, text in zip(spans, read, strict=True):
            if span.ids[-1] not in self.template.stop_ids:
                raise UserError(
                    f"{span.origin}: the tokenizer splits the stop token at the end of {span.text[-40:]!r}, so "
                    "that the model would not learn to stop; name it in model.special_tokens"
                )
            if text == span.text:
                continue
            alone = self.backend.decode(
                self.backend.encode(span.text, add_special_tokens=False).ids, skip_special_tokens=False
            )
            if text.lstrip() != alone.lstrip():
                raise UserError(
                    f"{span.origin}: the supervised tokens read {text[:80]!r}, but the chat template wrote "
                    f"{span.text[:80]!r}; the tokenizer does not keep the two apart: give another as model.tokenizer"
                )

    def encode_texts(self, texts: Sequence[TextRow], max_length: int) -> list[TokenRow]:
        """Each text as BOS (if the tokenizer puts one before plain text), its tokens and EOS, every token but a row's
        first supervised; a longer text as consecutive pieces of `max_length` tokens, each a row with its own BOS. EOS
        stands only where the text ends.
        """
        bos = self.bos_ids()
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        room = max_length - len(bos)
        rows = []
        encodings = self.backend.encode_batch([row.text for row in texts], add_special_tokens=False)
        for row, encoding in zip(texts, encodings, strict=True):
            body = encoding.ids
            if bos and body[:1] == bos:
                body = body[1:]
            last = max(1, -(-len(body) // room))  # EOS alone is no piece: a text that fills its last one ends there
            for piece in range(last):
                ids = bos + body[piece * room : (piece + 1) * room]
                if piece == last - 1 and len(ids) < max_length:
                    ids = ids + eos
                rows.append(TokenRow(ids, [IGNORED, *ids[1:]], row.origin, piece))
        return rows

    def bos_ids(self) -> list[int]:
        """The BOS token in a list if the tokenizer puts it before plain text, else an empty list."""
        bos = [] if self.bos_id is None else [self.bos_id]
        return bos if self.tokenizer("a")["input_ids"][:1] == bos else []


@dataclass(frozen=True)
class _TokenSpan:
    """Tokens `start` to `end` (exclusive) of a row: their ids, and the characters of the rendering they stand for.

    `joined`: a token before them holds white space of the content together with the template's own.
    """

    start: int
    end: int
    ids: list[int]
    text: str
    origin: str
    joined: bool


def _token_span(encoding: tokenizers.Encoding, text: str, span: tuple[int, int], origin: str) -> _TokenSpan:
    """The tokens that lie within the characters of `span`.

    A token that begins before the span is left out, though it reaches into it: when the model serves, its first part is
    already in the prompt. That happens where content begins with white space that joins the template's own.
    """
    start, end = span
    first = encoding.char_to_token(start)
    while first is None and start < end:  # a character that the tokenizer drops
        start += 1
        first = encoding.char_to_token(start)
    last = encoding.char_to_token(end - 1)
    assert first is not None, f"{origin}: no token stands for a supervised span"
    assert last is not None, f"{origin}: no token stands for a stop token"
    joined = encoding.token_to_chars(first)[0] < start
    if joined:
        while encoding.token_to_chars(first)[0] < start:
            first += 1
        start = encoding.token_to_chars(first)[0]
    return _TokenSpan(first, last + 1, encoding.ids[first : last + 1], text[start:end], origin, joined)
