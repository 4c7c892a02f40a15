"""Rows as one page for a browser, which needs no network and no other file.

    content = page_data(data, choice, RowViewer(tokenizer), recipe="config/smol.py", config=config.data, account=lines)
    Path("data.html").write_text(page(content))

The rows are data in the page, and page.js draws those that are looked at. Nothing of them is ever read as HTML: the
data has no character that could end its element, the script writes texts alone, and the page's own policy forbids every
script but that one.
"""

import base64
import hashlib
import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.schema import DataConfig
from scripts.inspecting.choice import Choice, ShownRow
from src.accounting import LeftOut
from src.data import TokenizedData
from src.packing import row_lengths
from src.view import Piece, RowViewer

KINDS = ("text", "special", "bytes")

SCRIPTS = ("row.js", "histogram.js", "page.js")
"""The parts of the page's script, the one that starts it last."""

LEFT_OUT_ROWS = 10_000
"""Rows left out or cut that a page names; all of them are counted."""

BINS = 60
"""About how many bars the histogram of lengths has."""


def page_data(
    data: TokenizedData, choice: Choice, viewer: RowViewer, *, recipe: str, config: DataConfig, account: Sequence[str]
) -> dict[str, Any]:
    """What a page holds, as plain JSON.

    `pieces` are the different pieces as [text, kind, ids], and a row of `rows` names them by their places; its `runs`
    are the lengths in pieces of runs that are in turns not supervised and supervised. `reasons` counts the rows of
    `left_out`, of which the first are named.

    Raises:
        UserError: there is no row of the number that is asked for.
    """
    places: dict[tuple[int, ...], int] = {}
    pieces: list[list[Any]] = []
    rows = [_row(shown, places, pieces) for shown in choice.shown(viewer)]
    left_out = [row for side in choice.sides for row in data.left_out(side)]
    return {
        "recipe": recipe,
        "max_length": config.max_length,
        "account": list(account),
        "sides": {
            side: {key: data.report[side][key] for key in ("tokens", "supervised_tokens")} | {"rows": len(table)}
            for side, table in choice.sides.items()
        },
        "histogram": histogram(
            np.concatenate([row_lengths(table) for table in choice.sides.values()]),
            np.array([row.tokens for row in left_out if row.tokens is not None and row.reason != "truncated"], int),
            config.max_length,
        ),
        "pieces": pieces,
        "rows": rows,
        "reasons": Counter(row.reason for row in left_out),
        "left_out": [_left_out(row) for row in left_out[:LEFT_OUT_ROWS]],
    }


def _row(shown: ShownRow, places: dict[tuple[int, ...], int], pieces: list[list[Any]]) -> dict[str, Any]:
    view = shown.view
    runs = [len(list(run)) for _, run in itertools.groupby(view.pieces, key=lambda piece: piece.supervised)]
    if view.pieces[0].supervised:
        runs.insert(0, 0)
    return {
        "side": shown.side,
        "number": shown.number,
        "origin": shown.origin,
        "tokens": view.tokens(),
        "supervised": view.supervised_tokens(),
        "pieces": [_place(piece, places, pieces) for piece in view.pieces],
        "runs": runs,
        "turns": [[turn.first, turn.role] for turn in view.turns],
    }


def _place(piece: Piece, places: dict[tuple[int, ...], int], pieces: list[list[Any]]) -> int:
    place = places.setdefault((*piece.ids, KINDS.index(piece.kind)), len(pieces))
    if place == len(pieces):
        pieces.append([piece.text, KINDS.index(piece.kind), list(piece.ids)])
    return place


def _left_out(row: LeftOut) -> dict[str, Any]:
    return {
        "side": row.side,
        "origin": row.origin,
        "reason": row.reason,
        "detail": row.detail,
        "tokens": row.tokens,
    }


def histogram(kept: np.ndarray, left_out: np.ndarray, max_length: int) -> dict[str, Any]:
    """Rows by length: `kept` and `left_out` are counts of bars that are `width` tokens wide, the first from 0.

    The bars reach to `max_length`, unless no row comes near it. Rows of more than twice that are all in the last bar,
    and `open` says so.

    Args:
        kept: tokens of each row that is trained on or evaluated on, int64.
        left_out: tokens of each row that is left out.
    """
    lengths = np.concatenate([kept, left_out])
    longest = int(lengths.max(initial=1))
    end = min(longest, 2 * max_length)
    if max_length < 3 * longest:
        end = max(end, max_length)
    width = next(size for size in _round_numbers() if size * BINS > end)
    bars = end // width + 1
    return {
        "width": width,
        "kept": np.bincount(np.minimum(kept // width, bars - 1), minlength=bars).tolist(),
        "left_out": np.bincount(np.minimum(left_out // width, bars - 1), minlength=bars).tolist(),
        "open": longest >= bars * width,
    }


def _round_numbers() -> itertools.chain[int]:
    return itertools.chain.from_iterable((1 * 10**power, 2 * 10**power, 5 * 10**power) for power in itertools.count())


def page(content: dict[str, Any]) -> str:
    """The page that shows what `page_data` found."""
    folder = Path(__file__).parent
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    filled = {
        "policy": f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}",
        "title": html.escape(f"{content['recipe']}: the data"),
        "style": style,
        "script": script,
        "data": script_safe(content),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def script_safe(content: Any) -> str:
    """JSON in ASCII without <, > and &, so that no text in it can end the element that it stands in."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(text: str) -> str:
    """How a content security policy names a text that may stand in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
