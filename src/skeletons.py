"""Skeletons: conversations with unique stand-ins in place of their texts, and what a template writes around those.

    shape, slots = take_apart(conversation)     # shape: hashable, the same for rows that differ in their texts alone
    skeleton = skeleton_of(shape)               # the conversation again, "xq70"7qx" where the first text was
    pieces = cut(template.render([skeleton])[0])
    pieces.filled(slots)                        # what the template is to write for the row itself

A stand-in holds a quotation mark, so that a template that writes a text as JSON shows it. White space around a text and
reasoning tags within it stay as they are, since templates trim the one and part at the other.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from src.formats import Conversation

STAND_IN = re.compile(r'xq7(\d+)(\\?)"7qx')
REASONING_TAG = re.compile(r"</?think>")
TEXT_KEYS = ("content", "text", "reasoning_content", "reasoning", "thinking", "arguments")
PLAIN_KEYS = {"role", "content"}

Shape = tuple[str, ...]
"""JSON of the tools (or nothing), then for each message its role, or its JSON where it is more than a plain text."""


def take_apart(conversation: Conversation) -> tuple[Shape, list[str]]:
    """A conversation's shape, and the texts that its skeleton has stand-ins for, in order."""
    slots: list[str] = []
    shape = [json.dumps(conversation.tools, ensure_ascii=False) if conversation.tools else ""]
    for message in conversation.messages:
        content = message.get("content")
        if (
            isinstance(content, str)
            and content
            and not content[0].isspace()
            and not content[-1].isspace()
            and "think>" not in content
            and message.keys() == PLAIN_KEYS
        ):
            slots.append(content)
            shape.append(message["role"])
        else:
            shape.append(json.dumps(_with_stand_ins(message, slots, ""), ensure_ascii=False))
    return tuple(shape), slots


def skeleton_of(shape: Shape, origin: str = "skeleton") -> tuple[Conversation, list[int]]:
    """The conversation of a shape, with the message that each stand-in belongs to."""
    messages, owners = [], []
    for index, part in enumerate(shape[1:]):
        if part.startswith("{"):
            messages.append(json.loads(part))
            owners += [index] * len(STAND_IN.findall(part.replace('\\"', '"')))
        else:
            messages.append({"role": part, "content": stand_in(len(owners))})
            owners.append(index)
    return Conversation(tuple(messages), origin, tuple(json.loads(shape[0])) if shape[0] else ()), owners


def stand_in(number: int) -> str:
    """The text that stands for the text of this number."""
    return f'xq7{number}"7qx'


def _with_stand_ins(value: Any, slots: list[str], inside: str) -> Any:
    """`value` with a stand-in for each text that belongs to a key of TEXT_KEYS; the texts are added to `slots`.

    `inside` is the key that `value` is below. All texts in a call's arguments belong to them, while a part of a
    content has more keys than its text.
    """
    if isinstance(value, dict):
        return {
            key: _with_stand_ins(item, slots, inside if inside == "arguments" else key) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_stand_ins(item, slots, inside) for item in value]
    return _stood_in(value, slots) if inside in TEXT_KEYS and isinstance(value, str) else value


def _stood_in(text: str, slots: list[str]) -> str:
    parts, end = [], 0
    for tag in (*REASONING_TAG.finditer(text), None):
        part = text[end : tag.start() if tag else len(text)]
        body = part.strip()
        if body:
            start = part.index(body)
            parts += [part[:start], stand_in(len(slots)), part[start + len(body) :]]
            slots.append(body)
        else:
            parts.append(part)
        if tag:
            parts.append(tag.group())
            end = tag.end()
    return "".join(parts)


@dataclass(frozen=True)
class Pieces:
    """A rendered skeleton, cut at its stand-ins.

    `literals` are the template's own texts, one more than there are occurrences of stand-ins; of each occurrence,
    `numbers` tells the slot, `escaped` whether it stands within JSON, `borders` where it is in `text`.
    """

    text: str
    literals: tuple[str, ...]
    numbers: tuple[int, ...]
    escaped: tuple[bool, ...]
    borders: tuple[tuple[int, int], ...]

    def filled(self, slots: Sequence[str]) -> tuple[str, list[int]]:
        """The text with the slots' texts in place of the stand-ins, and how long the first 0, 1, ... of them are."""
        texts = [slots[number] for number in self.numbers]
        if any(self.escaped):
            texts = [
                json.dumps(text, ensure_ascii=False)[1:-1] if escaped else text
                for text, escaped in zip(texts, self.escaped, strict=True)
            ]
        parts = [""] * (2 * len(texts) + 1)
        parts[::2] = self.literals
        parts[1::2] = texts
        return "".join(parts), [0, *accumulate(map(len, texts))]

    def place(self, position: int) -> tuple[int, int]:
        """A position in `text` outside of stand-ins, as characters of literals and occurrences before it."""
        count = bisect_left(self.borders, (position, position))
        return position - self._widths[count], count

    def position(self, place: tuple[int, int]) -> int:
        """The position in `text` that `place` was made of."""
        return place[0] + self._widths[place[1]]

    @cached_property
    def _widths(self) -> list[int]:
        """How long the first 0, 1, ... stand-ins are."""
        return [0, *accumulate(end - start for start, end in self.borders)]


def cut(text: str) -> Pieces:
    """Cut a rendered skeleton at its stand-ins."""
    found = list(STAND_IN.finditer(text))
    edges = [0, *(edge for match in found for edge in match.span()), len(text)]
    return Pieces(
        text=text,
        literals=tuple(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)),
        numbers=tuple(int(match[1]) for match in found),
        escaped=tuple(bool(match[2]) for match in found),
        borders=tuple(match.span() for match in found),
    )
