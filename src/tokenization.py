"""Token rows: conversations and texts as ids, with a label for each token that the loss counts.

    encoder = RowEncoder.of(tokenizer, supervise="assistant")
    rows = encoder.encode_conversations(conversations)   # each whole, of any length
    rows = encoder.encode_texts(texts, max_length=2048)  # each of at most max_length tokens

A label is the token's own id, or -100 where it is not supervised; labels are unshifted, as in Hugging Face models, and
the first of every row is -100, as no token comes before it. The supervised tokens of a turn stand for characters of its
span and for no others, and the last of them is a stop token; a row is checked for that before it leaves this module.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig
from src.alignment import RenderedChat, TurnFinder, without_stop
from src.chat import ChatTemplate
from src.content import ContentEncoder
from src.formats import Conversation, TextRow
from src.refusal import Kind, Refusal, RowRefusedError
from src.served import Part, as_served, turn_by_turn
from src.token_bytes import TokenBytes
from src.token_spans import ByteTokens, OffsetTokens, TokenSpan
from utils.errors import UserError

IGNORED = -100


OTHER_TOKENS = "the tokenizer gives the end of the prompt other tokens where the turn follows it"
"""Why a row is unlike served whose text is not."""

TAIL = 6
"""Tokens before a turn that are tokenized again by themselves."""

COMPARED = 3
"""The last of them, which must come out as they were; the first ones may lack what stood before them."""

ENDS_KEPT = 100_000
"""Ends of prompts that are remembered."""

ANCHOR = "a"
"""Stands before the text of a turn where the tokenizer would put a space before it."""


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One row: `input_ids` and `labels` are int32 arrays of one length, which may be views of a batch's.

    `piece` counts the pieces of a text from 0, or the rows of a conversation that is trained turn by turn, of which
    there are `turn_rows`; both are 0 for a conversation that is one row. `unlike_served` says why the tokens before a
    supervised turn are not those of a server's prompt; empty: they are. `prompt_apart`: they are because the prompt was
    tokenized by itself, as a server does. `lost_reasoning` and `clock_dependent` are those of
    `src.alignment.RenderedChat`; `special_text` says whether the row's texts hold that of a special token.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    origin: str
    piece: int = 0
    unlike_served: str = ""
    prompt_apart: bool = False
    lost_reasoning: int = 0
    special_text: bool = False
    turn_rows: int = 0
    clock_dependent: bool = False

    def supervised_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return int(np.count_nonzero(self.labels != IGNORED))


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into ids in batches, which the tokenizer's Rust threads share.

    `backend` is the tokenizer's own model without its post-processor: that one adds no token here, but may trim the
    white space from the offsets that tell where a token is. `template` and `finder` are None if there are only texts;
    `content` is None where a special token's text in a message becomes that token. `keep_unlike`: a conversation that
    is not as a server would give it is trained so; if not, its row is for the caller to leave out. `prompt_ends`
    remembers of the last tokens of prompts whether they stay as they are where no answer follows.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: tokenizers.Tokenizer
    bos_id: int | None
    supervise: str
    template: ChatTemplate | None
    finder: TurnFinder | None
    content: ContentEncoder | None
    keep_unlike: bool
    prompt_ends: dict[bytes, bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        supervise: str = DataConfig.supervise,
        *,
        chat: bool = True,
        template_date: str | None = DataConfig.template_date,
        allow_special_tokens_in_content: bool = DataConfig.allow_special_tokens_in_content,
        unlike_served: str = DataConfig.unlike_served,
    ) -> "RowEncoder":
        """Prepare a tokenizer.

        Args:
            supervise: one of the values of data.supervise.
            chat: whether conversations will be encoded, which needs a chat template.
            unlike_served: one of the values of data.unlike_served.
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
        finder = TurnFinder(template, supervise, allow_special_tokens_in_content) if template else None
        content = ContentEncoder.of(tokenizer, backend) if chat and not allow_special_tokens_in_content else None
        keep_unlike = unlike_served == "train_as_served"
        return cls(tokenizer, backend, tokenizer.bos_token_id, supervise, template, finder, content, keep_unlike)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[TokenRow | Refusal]:
        """The rows of each conversation in order, uncut, with each supervised span checked; or why it has none.

        A conversation has one row, or where it is trained turn by turn several of the same origin; or one refusal.
        """
        return self.encode_parts(as_served(self.finder, conversations, keep_unlike=self.keep_unlike))

    def encode_parts(self, parts: Sequence[Part]) -> list[TokenRow | Refusal]:
        """The rows of parts; where a turn is not as a server gives it, one for each turn of its conversation."""
        encoded = iter(self._encoded([part.chat.text for part in parts if not isinstance(part.chat, Refusal)]))
        begins_with_bos = bool(self.bos_ids())
        rows: list[TokenRow | Refusal] = []
        checked = False
        for part in parts:
            row: TokenRow | Refusal = part.chat
            if isinstance(part.chat, RenderedChat):
                tokens = next(encoded)
                if not checked:
                    self._check_against_tokenizer(part.conversation, tokens.ids.tolist())
                    checked = True
                row = self._row_or_refusal(part, tokens, begins_with_bos)
            if isinstance(row, TokenRow) and row.unlike_served == OTHER_TOKENS and self._may_part(part):
                turns = turn_by_turn(self.finder, part)
                if len(turns) > 1:
                    rows += self.encode_parts(turns)
                    continue
            if part.piece and isinstance(rows[-1], Refusal):
                continue
            if part.piece and isinstance(row, Refusal):
                del rows[-part.piece :]  # the conversation's earlier turns
            rows.append(row)
        return rows

    def _row_or_refusal(
        self, part: Part, tokens: ByteTokens | OffsetTokens, begins_with_bos: bool
    ) -> TokenRow | Refusal:
        try:
            if self.supervise == "all":
                self._check_final_stop(part.conversation, part.chat.text)
            self._check_bos(tokens.ids[:2].tolist(), part.conversation.origin, begins_with_bos)
            return self._row(part, part.chat, tokens)
        except RowRefusedError as error:
            return error.refusal

    @functools.cached_property
    def _token_bytes(self) -> TokenBytes | None:
        return TokenBytes.of(self.backend)

    def _encoded(self, texts: Sequence[str]) -> list[ByteTokens | OffsetTokens]:
        """The tokens of texts; the first one tells whether offsets are needed for all, else only some texts do."""
        table = self._token_bytes if texts else None
        if table is None or table.place(texts[:1], self._ids(texts[:1])) == [None]:
            return self._with_offsets(texts)
        placed = table.place(texts, self._ids(texts))
        others = [index for index, tokens in enumerate(placed) if tokens is None]
        for index, tokens in zip(others, self._with_offsets([texts[index] for index in others]), strict=True):
            placed[index] = tokens
        return placed

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _with_offsets(self, texts: Sequence[str]) -> list[OffsetTokens]:
        return [OffsetTokens.of(encoding) for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def _row(self, part: Part, chat: RenderedChat, tokens: ByteTokens | OffsetTokens) -> TokenRow:
        origin = part.conversation.origin
        if chat.contents and self.content is not None:
            tokens = self.content.encode(chat.text, chat.contents, self.template.special_token, origin)
        unlike, apart = chat.unlike_served, False
        if self.supervise == "all":
            labels = tokens.ids.copy()
        else:
            spans = self._spans(tokens, chat, origin)
            if not (unlike or all(self._prompt_is_served(tokens, chat.text, span) for span in spans)):
                unlike = OTHER_TOKENS
                if self.keep_unlike and len(spans) == 1 and (served := self._prompt_apart(chat)) is not None:
                    tokens, unlike, apart = served, "", True
                    spans = self._spans(tokens, chat, origin)
            labels = np.full(len(tokens.ids), IGNORED, dtype=np.int32)
            for (first, end, _), span in zip(spans, chat.spans, strict=True):
                if int(tokens.ids[end - 1]) not in self.template.stop_ids:
                    raise _refused(
                        origin,
                        "untrained_stop",
                        f"the tokenizer splits the stop token at the end of {chat.text[slice(*span)][-40:]!r}, so that "
                        "the model would not learn to stop; name it in model.special_tokens",
                    )
                labels[first:end] = tokens.ids[first:end]
        labels[:1] = IGNORED
        return TokenRow(
            tokens.ids,
            labels,
            origin,
            part.piece,
            unlike_served=unlike,
            prompt_apart=apart,
            lost_reasoning=chat.lost_reasoning,
            special_text=bool(chat.contents),
            turn_rows=part.turn_rows,
            clock_dependent=chat.clock_dependent,
        )

    def _spans(self, tokens: ByteTokens | OffsetTokens, chat: RenderedChat, origin: str) -> list[TokenSpan]:
        if isinstance(tokens, ByteTokens):
            spans = tokens.spans(chat.text, chat.spans)
            if spans is not None:
                return spans
            [tokens] = self._with_offsets([chat.text])
        return tokens.spans(chat.text, chat.spans, origin)

    def _may_part(self, part: Part) -> bool:
        """Whether a conversation of several supervised turns is still one row, and may be more."""
        return self.keep_unlike and part.turn_rows == 0 and len(part.chat.spans) > 1

    def _prompt_is_served(self, tokens: ByteTokens | OffsetTokens, text: str, span: TokenSpan) -> bool:
        """Whether the tokens before a supervised turn are those of its prompt by itself.

        They are others where a token stands for the prompt's end and the turn's beginning, or where the tokenizer looks
        ahead: GPT-2's ends a run of line feeds one token earlier before a word than at the end of a text. What it sees
        is never far from the border, so the last tokens tell.
        """
        first, _, joined = span
        if joined:
            return False
        key = tokens.ids[max(0, first - TAIL) : first].tobytes()
        known = self.prompt_ends.get(key)
        if known is None:
            if len(self.prompt_ends) >= ENDS_KEPT:
                self.prompt_ends.clear()
            [alone] = self._ids([tokens.before(text, first, TAIL)])
            compared = tokens.ids[max(0, first - COMPARED) : first].tolist()
            known = self.prompt_ends[key] = alone[len(alone) - len(compared) :] == compared
        return known

    def _prompt_apart(self, chat: RenderedChat) -> ByteTokens | None:
        """The tokens of a row whose prompt and only turn are tokenized each by itself, as where a server prompts.

        None where that cannot be proved, or where texts of special tokens are to be read as plain text.
        """
        if chat.contents or self._token_bytes is None:
            return None
        [(start, _)] = chat.spans
        before = ANCHOR if self._token_bytes.lead else ""
        prompt, anchored, anchor = self._ids([chat.text[:start], before + chat.text[start:], before])
        if anchored[: len(anchor)] != anchor:
            return None
        [tokens] = self._token_bytes.place([chat.text], [prompt + anchored[len(anchor) :]])
        return tokens

    def _check_bos(self, start: list[int], origin: str, begins_with_bos: bool) -> None:
        """
        Args:
            start: the row's first two ids.
            begins_with_bos: whether the tokenizer puts BOS before plain text.
        Raises:
            RowRefusedError: a row begins with BOS twice, or without the BOS that the model knows from other texts.
        """
        bos = self.tokenizer.bos_token
        if self.bos_id is not None and start == [self.bos_id, self.bos_id]:
            raise _refused(
                origin,
                "doubled_bos",
                f"the chat template writes {bos} twice at the start; take one of them out of the template, and give it "
                "as model.chat_template",
            )
        if begins_with_bos and start[:1] != [self.bos_id]:
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
        for row, body in zip(texts, self._ids([row.text for row in texts]), strict=True):
            if bos and body[:1] == bos:
                body = body[1:]
            last = max(1, -(-len(body) // room))  # EOS alone is no piece: a text that fills its last one ends there
            for piece in range(last):
                ids = bos + body[piece * room : (piece + 1) * room]
                if piece == last - 1 and len(ids) < max_length:
                    ids = ids + eos
                rows.append(supervised_row(ids, row.origin, piece))
        return rows

    def bos_ids(self) -> list[int]:
        """The BOS token in a list if the tokenizer puts it before plain text, else an empty list."""
        bos = [] if self.bos_id is None else [self.bos_id]
        return bos if self.tokenizer("a")["input_ids"][:1] == bos else []


def supervised_row(ids: Sequence[int], origin: str, piece: int = 0) -> TokenRow:
    """A row of which every token but the first is supervised."""
    labels = np.array(ids, dtype=np.int32)
    row = TokenRow(labels.copy(), labels, origin, piece)
    labels[:1] = IGNORED
    return row


def _refused(origin: str, kind: Kind, found: str) -> RowRefusedError:
    return RowRefusedError(Refusal(origin, kind, f"{origin}: {found}"))
