"""Token rows: conversations and texts as ids, with a label for each token that the loss counts.

    encoder = RowEncoder.of(tokenizer, supervise="assistant")
    rows = encoder.encode_conversations(conversations)   # each whole, of any length
    rows = encoder.encode_texts(texts, max_length=2048)  # each of at most max_length tokens

A label is the token's own id, or -100 where it is not supervised; labels are unshifted, as in Hugging Face models, and
the first of every row is -100, as no token comes before it. The supervised tokens of a turn stand for characters of its
span and for no others, and the last of them is a stop token; a row is checked for that before it leaves this module.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig
from src.alignment import RenderedChat, TurnFinder, without_stop
from src.chat import ChatTemplate
from src.content import ContentEncoder, JoinedEncoding
from src.formats import Conversation, TextRow
from src.refusal import Kind, Refusal, RowRefusedError
from utils.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """One row: `labels` is as long as `input_ids`.

    `piece` counts a text's pieces from 0, and is 0 for a conversation; `joined_turns` counts the turns whose first
    white space is not supervised, because the tokenizer joins it with the template's own. `unlike_served` and
    `lost_reasoning` are those of `src.alignment.RenderedChat`; `special_text` says whether the row's texts hold that of
    a special token.
    """

    input_ids: list[int]
    labels: list[int]
    origin: str
    piece: int = 0
    joined_turns: int = 0
    unlike_served: str = ""
    lost_reasoning: int = 0
    special_text: bool = False

    def supervised_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into ids in batches, which the tokenizer's Rust threads share.

    `backend` is the tokenizer's own model without its post-processor: that one adds no token here, but may trim the
    white space from the offsets that tell where a token is. `template` and `finder` are None if there are only texts;
    `content` is None where a special token's text in a message becomes that token.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: tokenizers.Tokenizer
    bos_id: int | None
    supervise: str
    template: ChatTemplate | None
    finder: TurnFinder | None
    content: ContentEncoder | None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        supervise: str = DataConfig.supervise,
        *,
        chat: bool = True,
        template_date: str | None = DataConfig.template_date,
        allow_special_tokens_in_content: bool = DataConfig.allow_special_tokens_in_content,
    ) -> "RowEncoder":
        """Prepare a tokenizer.

        Args:
            supervise: one of the values of data.supervise.
            chat: whether conversations will be encoded, which needs a chat template.
        Raises:
            UserError: the tokenizer is not a fast one, or lacks the chat template.
        """
        template = ChatTemplate.of(tokenizer, template_date) if chat else None
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
        finder = TurnFinder(template, supervise) if template else None
        content = ContentEncoder.of(tokenizer, backend) if chat and not allow_special_tokens_in_content else None
        return cls(tokenizer, backend, tokenizer.bos_token_id, supervise, template, finder, content)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[TokenRow | Refusal]:
        """One row a conversation, uncut, each supervised span checked; or why it cannot be trained on exactly."""
        chats = self.finder.find(conversations)
        texts = [chat.text for chat in chats if not isinstance(chat, Refusal)]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        begins_with_bos = bool(self.bos_ids())
        rows: list[TokenRow | Refusal] = []
        checked = False
        for conversation, chat in zip(conversations, chats, strict=True):
            if isinstance(chat, Refusal):
                rows.append(chat)
                continue
            encoding = next(encodings)
            if not checked:
                self._check_against_tokenizer(conversation, encoding.ids)
                checked = True
            try:
                if self.supervise == "all":
                    self._check_final_stop(conversation, chat.text)
                self._check_bos(encoding.ids, conversation.origin, begins_with_bos)
                rows.append(self._row(conversation, chat, encoding))
            except RowRefusedError as error:
                rows.append(error.refusal)
        return rows

    def _row(self, conversation: Conversation, chat: RenderedChat, encoding: tokenizers.Encoding) -> TokenRow:
        origin = conversation.origin
        if chat.contents and self.content is not None:
            encoding = self.content.encode(chat.text, chat.contents, self.template.special_token, origin)
        ids = encoding.ids
        joined = 0
        if self.supervise == "all":
            labels = [IGNORED, *ids[1:]]
        else:
            labels = [IGNORED] * len(ids)
            for span in chat.spans:
                first, end, cut = _token_span(encoding, chat.text, span, origin)
                if ids[end - 1] not in self.template.stop_ids:
                    raise _refused(
                        origin,
                        "untrained_stop",
                        f"the tokenizer splits the stop token at the end of {chat.text[slice(*span)][-40:]!r}, so that "
                        "the model would not learn to stop; name it in model.special_tokens",
                    )
                labels[first:end] = ids[first:end]
                joined += cut
            labels[0] = IGNORED
        return TokenRow(
            ids,
            labels,
            origin,
            joined_turns=joined,
            unlike_served=chat.unlike_served,
            lost_reasoning=chat.lost_reasoning,
            special_text=bool(chat.contents),
        )

    def _check_bos(self, ids: Sequence[int], origin: str, begins_with_bos: bool) -> None:
        """
        Args:
            begins_with_bos: whether the tokenizer puts BOS before plain text.
        Raises:
            RowRefusedError: a row begins with BOS twice, or without the BOS that the model knows from other texts.
        """
        bos = self.tokenizer.bos_token
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            raise _refused(
                origin,
                "doubled_bos",
                f"the chat template writes {bos} twice at the start; take one of them out of the template, and give it "
                "as model.chat_template",
            )
        if begins_with_bos and ids[:1] != [self.bos_id]:
            raise _refused(
                origin,
                "missing_bos",
                f"the chat template writes no {bos} at the start, which the tokenizer puts before every text; give a "
                "template that begins with {{ bos_token }} as model.chat_template",
            )

    def _check_against_tokenizer(self, conversation: Conversation, ids: list[int]) -> None:
        served = self.template.token_ids(conversation)
        assert ids == served, f"{conversation.origin}: the ids differ from those of apply_chat_template"

    def _check_final_stop(self, conversation: Conversation, text: str) -> None:
        last = conversation.messages[-1]
        ending = text.rstrip()
        stops = [match.end() for match in self.template.stop_token.finditer(ending)]
        if last["role"] == "assistant" and (not stops or stops[-1] != len(ending)):
            raise without_stop(conversation, len(conversation.messages) - 1, text)

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


def _refused(origin: str, kind: Kind, found: str) -> RowRefusedError:
    return RowRefusedError(Refusal(origin, kind, f"{origin}: {found}"))


def _token_span(
    encoding: tokenizers.Encoding | JoinedEncoding, text: str, span: tuple[int, int], origin: str
) -> tuple[int, int, bool]:
    """The tokens that lie within the characters of `span`, as first and end, and whether the first one was left out.

    A token that begins before the span is left out, though it reaches into it: when the model serves, its first part is
    already in the prompt. That happens where content begins with white space that joins the template's own.

    Raises:
        RowRefusedError: the last token reaches beyond the span.
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
    reach = encoding.token_to_chars(last)[1]
    if reach > end and text[end:reach].strip():
        raise _refused(
            origin,
            "untrained_stop",
            f"the tokenizer joins the end of {text[start:end][-40:]!r} with what the chat template writes after it; "
            "name its stop token in model.special_tokens",
        )
    return first, last + 1, joined
