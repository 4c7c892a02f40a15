"""Conversations as a server meets them: one turn at a time, where the template would write the whole otherwise.

    parts = as_served(finder, conversations)
    parts[0].chat.text       # the first conversation up to its first answer, as the prompt and answer of a served turn

Some templates write an answer in another way once more messages follow it: they take its reasoning out, or end it with
another token. A server asks for each answer while it is the last one. Such a conversation is therefore trained as one
row for each supervised turn: the messages up to that turn, with that turn alone supervised. Where the whole reads, up
to the end of each supervised turn, as it does with that turn as its last, one row gives the same and is kept.

Which of them are unlike served even so, and what then, is for `src.accounting`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from src.alignment import RenderedChat, TurnFinder, supervised_turns
from src.formats import Conversation
from src.refusal import Refusal


@dataclass(frozen=True)
class Part:
    """What becomes one row: a conversation or its beginning, of which `turn_rows` are made; `piece` counts from 0.

    `turn_rows` is 0 where the conversation is one row.
    """

    conversation: Conversation
    chat: RenderedChat | Refusal
    piece: int = 0
    turn_rows: int = 0


def as_whole(finder: TurnFinder, conversations: Sequence[Conversation]) -> list[Part]:
    """Each conversation as one part."""
    chats = finder.find(conversations)
    return [Part(conversation, chat) for conversation, chat in zip(conversations, chats, strict=True)]


def as_served(finder: TurnFinder, conversations: Sequence[Conversation], *, keep_unlike: bool = True) -> list[Part]:
    """The conversations in order, one part each, or one for each supervised turn where the whole is not what is served.

    A conversation stays whole, with what is found of the whole, where one of its beginnings would be refused.

    Args:
        keep_unlike: whether a conversation is trained of which the whole has another text before a supervised turn than
            a server would give; if not, it stays whole, for the caller to leave out.
    """
    whole = as_whole(finder, conversations)
    parts: list[Part] = []
    for part in whole:
        parts += turn_by_turn(finder, part) if _may_gain(part.chat, keep_unlike) else [part]
    return parts


def turn_by_turn(finder: TurnFinder, whole: Part) -> list[Part]:
    """A conversation as a part for each supervised turn; as it is where one of its beginnings would be refused."""
    found = as_whole(finder, [_up_to(whole.conversation, turn) for turn in _turns(whole.conversation, finder)])
    if not found or any(isinstance(each.chat, Refusal) for each in found):
        return [whole]
    return [replace(each, piece=piece, turn_rows=len(found)) for piece, each in enumerate(found)]


def _may_gain(chat: RenderedChat | Refusal, keep_unlike: bool) -> bool:
    """Whether the whole is not what is served, or does not show where its turns are."""
    if isinstance(chat, Refusal):
        return chat.kind == "unaligned"
    return chat.rewritten and (keep_unlike or not chat.unlike_served)


def _turns(conversation: Conversation, finder: TurnFinder) -> list[int]:
    """The supervised turns; none where the whole is already the beginning that ends with the only one."""
    turns = [] if finder.supervise == "all" else supervised_turns(conversation, finder.supervise)
    return [] if turns == [len(conversation.messages) - 1] else turns


def _up_to(conversation: Conversation, turn: int) -> Conversation:
    """The beginning of a conversation that ends with a turn, which alone is trained."""
    messages = conversation.messages[: turn + 1]
    others = tuple(index for index in range(turn) if messages[index]["role"] == "assistant")
    return replace(conversation, messages=messages, untrained=others)
