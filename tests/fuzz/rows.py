"""Odd rows, built by hypothesis: what a JSON file may hold where a conversation, a text or ids are expected.

for files in row_files(seed=7):
    files["rows.jsonl"]
"""

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import FLOATS, INTEGERS
from tests.fuzz.reader import BATCH, Files

_TEXTS = st.one_of(
    st.sampled_from(
        ("", " ", "hi", "a\nb", "<|im_end|>", "<|im_start|>", "<think>", "</think>a", 'xq70"7qx', "\x00", "\ud800")
    ),
    st.sampled_from(
        (
            "{",
            "[]",
            "[{}]",
            '{"name": "f"}',
            '[{"role": "user", "content": "a"}]',
            "\ufeff",
            "\x1b[31m",
            "🙂",
            "a" * 500,
        )
    ),
    st.text(alphabet=st.characters(codec=None), max_size=12),
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.sampled_from(FLOATS),
    st.just(10**30),
    _TEXTS,
    st.integers(-5, 300),
)
_ANY = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def _or_any(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what is expected there, and now and then anything."""
    return st.one_of(usual, usual, usual, _ANY)


_ROLES = _or_any(st.sampled_from(("user", "assistant", "system", "tool", "developer", "human", "gpt", "function_call")))
_CALL = st.fixed_dictionaries(
    {"function": _or_any(st.fixed_dictionaries({"name": _or_any(_TEXTS), "arguments": _ANY}))},
    optional={"id": _ANY, "type": _ANY},
)
_PARTS = st.lists(
    _or_any(st.fixed_dictionaries({"type": _or_any(st.just("text")), "text": _or_any(_TEXTS)})), max_size=3
)
_MESSAGE = st.fixed_dictionaries(
    {"role": _ROLES, "content": _or_any(st.one_of(_TEXTS, _PARTS))},
    optional={
        "tool_calls": _or_any(st.lists(_or_any(_CALL), max_size=2)),
        "reasoning_content": _or_any(_TEXTS),
        "thinking": _or_any(_TEXTS),
        "train": _ANY,
        "weight": _ANY,
        "name": _ANY,
        "tool_call_id": _ANY,
    },
)
_TURN = st.fixed_dictionaries({"from": _ROLES, "value": _or_any(_TEXTS)}, optional={"train": _ANY, "tool_calls": _ANY})
_TOOLS = st.one_of(
    _ANY,
    st.lists(
        _or_any(st.fixed_dictionaries({"name": _or_any(_TEXTS), "parameters": _ANY}, optional={"function": _ANY})),
        max_size=2,
    ),
)
_ASIDE = {"system": _or_any(_TEXTS), "tools": _TOOLS}
_IDS = _or_any(st.lists(_or_any(st.integers(0, 300)), max_size=6))


def _talk(messages: list[Any]) -> list[Any]:
    """A question before and an answer after, so that odd messages come as far as the template."""
    return [{"role": "user", "content": "hi"}, *messages, {"role": "assistant", "content": "hello"}]


_ROWS = (
    st.fixed_dictionaries({"messages": _or_any(st.lists(_or_any(_MESSAGE), max_size=5))}, optional=_ASIDE),
    st.fixed_dictionaries({"messages": st.lists(_MESSAGE, max_size=3).map(_talk)}, optional=_ASIDE),
    st.fixed_dictionaries({"conversations": _or_any(st.lists(_or_any(_TURN), max_size=5))}, optional=_ASIDE),
    st.fixed_dictionaries({"prompt": _or_any(_TEXTS), "completion": _or_any(_TEXTS)}, optional=_ASIDE),
    st.fixed_dictionaries({"question": _or_any(_TEXTS), "answer": _or_any(_TEXTS)}, optional=_ASIDE),
    st.fixed_dictionaries(
        {"instruction": _or_any(_TEXTS), "output": _or_any(_TEXTS)}, optional={**_ASIDE, "input": _ANY, "history": _ANY}
    ),
    st.fixed_dictionaries({"text": _or_any(_TEXTS)}),
    st.fixed_dictionaries({"input_ids": _IDS}, optional={"labels": _IDS, "attention_mask": _ANY}),
    st.dictionaries(_TEXTS, _ANY, max_size=3),
)
_FILES = st.sampled_from(_ROWS).flatmap(lambda row: st.lists(row, min_size=1, max_size=4))


def row_lists(number: int) -> list[list[Any]]:
    """`BATCH` lists of rows that `number` decides."""
    made: list[list[Any]] = []

    @seed(number)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_FILES)
    def collect(rows: list[Any]) -> None:
        made.append(rows)

    collect()
    return [made[index % len(made)] for index in range(BATCH)]


def row_files(number: int) -> Iterator[Files]:
    """`BATCH` folders with a jsonl file each."""
    for index, rows in enumerate(row_lists(number)):
        text = "\n".join(json.dumps(row, ensure_ascii=index % 2 == 0) for row in rows)
        yield {"rows.jsonl": text.encode("utf-8", "surrogatepass")}
