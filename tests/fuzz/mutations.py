"""Valid files -> files that are nearly valid, each by a handful of small changes that a seeded `Random` chooses.

    changed = mutated("config.json", content, Random(7))

A file's ending says what is changed beside plain bytes: values of JSON, lines and words of text, and in
`tests.fuzz.containers` the inside of pickles, safetensors, GGUF, protocol buffers and compressed files.
"""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

INTEGERS = (0, 1, -1, 2, 127, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-320, 1e308)
HEADER_BYTES = 256
"""Most formats say in these what the rest is; half of all changes are made there."""

TEXTS = (
    "",
    " ",
    "\x00",
    "\ufeff",
    "\ud800",
    "é",
    "日本",
    "a" * 300,
    "../../etc/passwd",
    "{",
    "[",
    "null",
    "\u2028",
    "\x1b[2J",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, {}, [], [[]], [{}], {"": None}, {"a": {"b": []}}, [None], ["a"], [1], {"0": 1}),
    *(*TEXTS, *INTEGERS, *FLOATS, 1e400, 10**30, -(10**30)),
)
WORDS: dict[str, tuple[str, ...]] = {
    "yaml": (
        *("&a [*a]", "*a", "&a ", "!!python/object/apply:os.system [ls]", "!!binary x", "!!timestamp x", "!!bool x"),
        *(
            "!!int x",
            "!!float x",
            "!!omap [1]",
            "!!set {a}",
            "? [a]",
            "<<: *a",
            "<<: [1]",
            "- ",
            ": ",
            "---\n",
            "...\n",
        ),
        *(".inf", ".nan", "1e999", "0x", "0b", "0o9", "1_0", "190:20:30", "9" * 5000, '"\\ud800"', '"\\U00110000"'),
        *(
            "[" * 50,
            "{" * 50,
            "[" * 2000,
            "{a: " * 2000,
            "\t",
            "%YAML 9.9\n",
            "null",
            "~",
            "!<x> y",
            "\x85",
            "| \n",
            ">-\n",
        ),
    ),
    "jinja": (
        *("{{", "}}", "{%", "%}", "{#", "-", "{{ 1 / 0 }}", "{{ messages[99] }}", "{{ messages | length + 'a' }}"),
        *("{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ 'a' * 10**12 }}", "{{ x.y.z }}"),
        *("{{ ''.__class__.__mro__ }}", "{{ range(10**9) | list }}", "{% include 'x' %}", "{% extends 'x' %}"),
        *(
            "{{ raise_exception('no') }}",
            "{{ strftime_now('%Y') }}",
            "{{ strftime_now(1) }}",
            "{{ strftime_now( '%Q' ) }}",
        ),
        *(
            "{{ messages | tojson(indent=-1) }}",
            "{{ 9999999 ** 9 }}",
            "{% set a = a %}",
            "{{ caller() }}",
            "{% macro f() %}",
        ),
        *("{{ f() }}", "{% endmacro %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages.pop() }}"),
        *("{% generation %}", "{% endgeneration %}", "{{ '%s' % (1, 2) }}", "{{ messages[0]['role']['x'] }}"),
        *(
            "{{ [1] | sum(start='a') }}",
            "{{ 'a' | int(base=99) }}",
            "{{ messages | sort(attribute='x') }}",
            "{{ loop.index }}",
        ),
        *(
            "{{ '{0.x}'.format(1) }}",
            "{{ '{' | format }}",
            "{{ 'a'.encode('x') }}",
            "{{ namespace(1) }}",
            "{% break %}",
        ),
    ),
    "text": (
        *(
            '"',
            '""',
            "'",
            ",",
            ";",
            "\t",
            "\n",
            "\r\n",
            "\r",
            "\n\n",
            "\\",
            "<|endoftext|>",
            "\n<|endoftext|>\n",
            "\x00",
        ),
        *(
            "\ufeff",
            "\u2028",
            "{",
            "}",
            "[",
            "]",
            "[[[[",
            "null",
            "NaN",
            "-Infinity",
            "1e999",
            "9" * 5000,
            "\\ud800",
            '{"a":',
        ),
        *('{"a":' * 3000, "[" * 3000, "true", ":", '"\\'),
    ),
}
"""Words that are put into text, by its kind."""

TEXT_KINDS = {
    "yaml": "yaml",
    "yml": "yaml",
    "jinja": "jinja",
    "json": "text",
    "jsonl": "text",
    "csv": "text",
    "txt": "text",
}


def mutated(name: str, content: bytes, random: Random) -> bytes:
    """A file of that name with one to four changes."""
    from tests.fuzz.containers import INSIDE

    ending = name.rpartition(".")[2]
    ways: list[Callable[[bytes, Random], bytes]] = [changed_bytes]
    if ending in ("json", "jsonl", "yaml"):
        ways += [changed_json] * 3
    if ending in TEXT_KINDS:
        ways += [lambda data, source: changed_text(data, source, WORDS[TEXT_KINDS[ending]])] * 2
    if ending in INSIDE:
        ways += [INSIDE[ending]] * 2
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        try:
            content = random.choice(ways)(content, random)
        except Exception:  # noqa: BLE001 - what was changed before is not always what a way expects
            content = changed_bytes(content, random)
    return content


def changed_bytes(data: bytes, random: Random) -> bytes:
    """One change that knows nothing of the format."""
    if not data:
        return random.randbytes(random.choice((1, 4, 64)))
    out = bytearray(data)
    at = random.randrange(min(len(out), HEADER_BYTES) if random.random() < 0.5 else len(out))
    end = min(len(out), at + random.choice((1, 2, 4, 8, 16, 64, len(out))))
    way = random.randrange(9)
    if way == 0:
        out[at] ^= 1 << random.randrange(8)
    elif way == 1:
        out[at] = random.randrange(256)
    elif way == 2:
        out[at:at] = random.randbytes(random.choice((1, 2, 8, 64)))
    elif way == 3:
        del out[at:end]
    elif way == 4:
        out[at:at] = out[at:end]
    elif way == 5:
        del out[at:]
    elif way == 6:
        layout, bits = random.choice((("<H", 16), ("<I", 32), ("<Q", 64), (">I", 32)))
        packed = struct.pack(layout, random.choice(INTEGERS) % 2**bits)
        out[at : at + len(packed)] = packed
    elif way == 7:
        out[at:end] = bytes([random.choice((0, 255, 128, 32))]) * (end - at)
    else:
        other = random.randrange(len(out))
        part = out[other : other + end - at]
        out[at : at + len(part)] = part
    return bytes(out)


def changed_text(data: bytes, random: Random, words: tuple[str, ...]) -> bytes:
    """One change of lines or words."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    way = random.randrange(5)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(random.randrange(len(lines)), lines[at])
    else:
        place = random.randrange(len(lines[at]) + 1)
        end = place if way < 4 else min(len(lines[at]), place + random.choice((1, 4, 16)))
        word = random.choice(words).encode("utf-8", "surrogatepass")
        lines[at] = lines[at][:place] + word + lines[at][end:]
    return b"\n".join(lines)


def changed_json(data: bytes, random: Random) -> bytes:
    """One value of a JSON text, or of one line of several, replaced, removed, repeated or named otherwise."""
    whole = data.strip()
    lines = [whole] if not whole.startswith(b"{") or b"\n{" not in whole else whole.split(b"\n")
    at = random.randrange(len(lines))
    try:
        tree = json.loads(lines[at])
    except (ValueError, RecursionError):
        return changed_bytes(data, random)
    lines[at] = dumped(changed_tree(tree, random), random).encode("utf-8", "surrogatepass")
    return b"\n".join(lines) + b"\n" * data.endswith(b"\n")


def dumped(tree: Any, random: Random) -> str:
    """JSON of a tree; now and then with characters as they are, halves of surrogate pairs included."""
    try:
        return json.dumps(tree, ensure_ascii=random.random() < 0.8)
    except RecursionError:  # changed twice to be deep
        return "[" * 3000


def changed_tree(tree: Any, random: Random) -> Any:
    """A tree of dicts and lists with one part changed; `tree` itself may be."""
    places = list(_places(tree))
    if not places:
        return odd_value(tree, random)
    holder, key = random.choice(places)
    way = random.randrange(8)
    if way < 4:
        holder[key] = odd_value(holder[key], random)
    elif way == 4:
        del holder[key]
    elif way == 5:
        other, name = random.choice(places)
        holder[key] = other[name]
        if _loops(tree):
            holder[key] = None
    elif way == 6 and isinstance(holder, dict):
        holder[random.choice((*TEXTS, "model_type", "type"))] = holder.pop(key)
    else:
        depth = random.choice((1, 2, 50, 300))
        value = holder[key]
        for _ in range(depth):
            value = [value] if way % 2 else {"a": value}
        holder[key] = value
    return tree


def odd_value(value: Any, random: Random) -> Any:
    """Another value for one: of another kind, or nearby."""
    if isinstance(value, bool) or random.random() < 0.5:
        return random.choice(VALUES)
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value)))
    if isinstance(value, float):
        return random.choice((-value, value * 1e6, *FLOATS))
    if isinstance(value, str) and value:
        cut = random.randrange(len(value))
        return random.choice((value[:cut], value[cut:] * 3, value.upper(), value[:cut] + random.choice(TEXTS)))
    return random.choice(VALUES)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a tree, without recursion; a list of more than 50 gives 50 of its places."""
    found, open_ = [], [tree]
    while open_:
        holder = open_.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        step = max(1, len(keys) // 50)
        for key in list(keys)[::step]:
            found.append((holder, key))
            open_.append(holder[key])
        if len(found) > 20_000:
            break
    return found


def _loops(tree: Any) -> bool:
    try:
        json.dumps(tree)
    except (ValueError, RecursionError):
        return True
    return False
