"""Conversations that chat templates are known to stumble over, and a tokenizer for any template's text."""

import re

from transformers import PreTrainedTokenizerFast

from src.formats import Conversation
from tests.toy_tokenizer import toy_tokenizer

MARKERS = re.compile(
    r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|<\|(?:turn|channel|tool_call|tool_response|tool)>"
    r"|<(?:turn|channel|tool_call|tool_response|tool)\|>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>|\[/?INST\]"
)
"""Texts in a template that its family's tokenizers have as special tokens."""

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Oslo"}}, "id": "abcdefghi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a city"}},
            "required": ["city"],
        },
    },
}


def template_tokenizer(template: str, eos: str, **settings: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer with a template and the special tokens that stand in it."""
    special = tuple(dict.fromkeys(["<bos>", *MARKERS.findall(template)]))
    return toy_tokenizer(template, bos="<bos>", eos=eos, special=special, **settings)


def battery(stop: str, *, parts: bool = False) -> dict[str, Conversation]:
    """Conversations by name.

    Args:
        stop: the text of the family's stop token, which some of the contents hold.
        parts: whether contents are lists of one text part, as templates of vision models take them.
    """
    dialogs = {
        f"{turns} turns": [text for turn in range(turns) for text in (f"q{turn}?", f"Answer {turn}.")]
        for turns in range(1, 7)
    }
    dialogs |= {
        "unicode": ["日本 é?", "cafe\u0301 😀 — ok", "ش", "\u200bمرحبا!"],
        "empty": ["hi", "", "why?", "Two."],
        "empty at the end": ["hi", "One.", "why?", ""],
        "repeated": ["the cat", "the cat", "the cat", "the cat"],
        "prefix of another": ["a", "a", "assistant", "user"],
        "special text": [f"say {stop} x", f"The cat{stop} no", "and?", f"{stop}"],
        "spaces": ["  hi ", "  One.  ", "why? ", "\n\nTwo.\n"],
        "line feeds": ["a\n\nb", "One.\n\n\nTwo.\n\nThree."],
    }
    found = {}
    for name, texts in dialogs.items():
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        found[name] = turns
        if name in ("1 turns", "2 turns", "special text", "spaces"):
            found[f"system, {name}"] = [{"role": "system", "content": "Be brief."}, *turns]
    found["user last"] = [*found["2 turns"], {"role": "user", "content": "bye"}]
    thought = "<think>\nhm\n</think>\n\nOne."
    found["thinking"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": thought}]
    found["thinking twice"] = [*found["thinking"], *found["thinking"]]
    found["reasoning field"] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "One.", "reasoning_content": "hm"},
    ]
    found["reasoning field twice"] = [*found["reasoning field"], *found["reasoning field"]]
    asked = {"role": "user", "content": "How cold is Oslo?"}
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": '{"degrees": 3}', "name": "look_up", "tool_call_id": "abcdefghi"}
    tools = {
        "call": [asked, calling],
        "call and result": [asked, calling, result, {"role": "assistant", "content": "3 degrees."}],
        "text and call": [asked, {**calling, "content": "I look."}, result, {"role": "assistant", "content": "3."}],
    }
    if parts:
        for turns in found.values():
            turns[:] = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        tools = {}
    rows = {name: Conversation(tuple(turns), name) for name, turns in found.items()}
    return rows | {name: Conversation(tuple(turns), name, (TOOL,)) for name, turns in tools.items()}
