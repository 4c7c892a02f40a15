"""Rows as text for a terminal, or for a pipe, where colours mean nothing.

    print(coloured(row))      # supervised text green, special tokens in reverse, each second token darker
    print(bracketed(row))     # supervised text in [[double brackets]]

Control characters of a row are shown as their pictures, so that no row can steer the terminal.
"""

import re
from collections.abc import Sequence

from src.view import Piece, ViewedRow

GREEN, REVERSE, DIM, PLAIN = "32", "7", "2", "0"

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
"""Characters that a terminal obeys, or that nobody sees: all controls but tab and line feed, and those of direction."""

RULE_COLUMNS = 72


def bracketed(row: ViewedRow) -> str:
    """The row's text with each supervised run between [[ and ]], and with no other mark."""
    written = []
    inside = False
    for piece in row.pieces:
        if piece.supervised != inside:
            written.append("]]" if inside else "[[")
            inside = piece.supervised
        written.append(without_controls(piece.text))
    return "".join(written) + ("]]" if inside else "")


def coloured(row: ViewedRow) -> str:
    """The row's text in colours, with a rule before each turn, and marks for white space that would not be seen."""
    turns = {turn.first: turn.role for turn in row.turns}
    written = []
    at_line_start = True
    for at, (piece, text) in enumerate(zip(row.pieces, _visible(row.pieces), strict=True)):
        if at in turns:
            line = f"\x1b[{DIM}m{'─' * 2} {without_controls(turns[at])} "
            written.append(("" if at_line_start else "\n") + line.ljust(RULE_COLUMNS, "─") + f"\x1b[{PLAIN}m\n")
        codes = [GREEN] * piece.supervised + [DIM] * (at % 2) + [REVERSE] * (piece.kind != "text")
        lines = text.split("\n")
        if codes:  # set anew on each line, as a pager forgets them at its end
            lines = [f"\x1b[{';'.join(codes)}m{line}\x1b[{PLAIN}m" if line else "" for line in lines]
        written.append("\n".join(lines))
        at_line_start = text.endswith("\n")
    return "".join(written)


def without_controls(text: str) -> str:
    """The text with pictures of its control characters, or their numbers; tabs and line feeds stay."""
    return UNSEEN.sub(lambda found: _picture(ord(found[0])), text)


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"


def _visible(pieces: Sequence[Piece]) -> list[str]:
    """Each piece's text with ↵ before a line feed, ⇥ before a tab, and · for a space that has no word on both sides in
    the same run of tokens."""
    texts = [without_controls(piece.text) for piece in pieces]
    runs = [(piece.supervised, piece.kind) for piece in pieces]
    visible = []
    for at, text in enumerate(texts):
        before = texts[at - 1][-1:] if at and runs[at - 1] == runs[at] else ""
        after = texts[at + 1][:1] if at + 1 < len(texts) and runs[at + 1] == runs[at] else ""
        shown = []
        for place, character in enumerate(text):
            left = text[place - 1] if place else before
            right = text[place + 1] if place + 1 < len(text) else after
            alone = not left.strip() or not right.strip()
            shown.append({" ": "·" if alone else " ", "\n": "↵\n", "\t": "⇥\t"}.get(character, character))
        visible.append("".join(shown))
    return visible
