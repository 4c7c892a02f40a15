"""Show what a model will see of a recipe's data: each row's text, and which of it is supervised.

python scripts/inspect_data.py --config config/smol.py
python scripts/inspect_data.py --config config/smol.py --rows 10 --data.max_length 512
python scripts/inspect_data.py --config config/smol.py --longest --side eval
python scripts/inspect_data.py --config config/smol.py --html data.html

Supervised text is green on a terminal, and stands in [[double brackets]] elsewhere or where NO_COLOR is set. The text
is decoded from the very token ids and labels that training gets. Any field of the recipe can be overridden, as for
train.py.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from datasets.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.loader import ConfigError, read_command_line
from scripts.inspecting.choice import Choice, sides_of
from scripts.inspecting.page import page, page_data
from scripts.inspecting.terminal import bracketed, coloured, without_controls
from src.data import TokenizedData, build_datasets, token_folder
from src.model import load_tokenizer
from src.new_tokenizer import with_tokenizer
from src.view import RowViewer
from utils.errors import UserError, tell_error
from utils.files import write_text
from utils.logging import set_up_logging

ROWS = 3
"""Rows of each side on a terminal, unless --rows says otherwise."""

ROWS_OF_A_PAGE = 10_000
"""Rows of each side on a page, unless --rows says otherwise: a browser is quick with as many."""


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or above")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Any other option overrides a field of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="recipe, a .py or .yaml file")
    parser.add_argument("--side", choices=("train", "eval"), help="only this side (default: both; for --row train)")
    parser.add_argument(
        "--rows",
        type=_count,
        help=f"rows shown of each side (default: {ROWS}, on a page {ROWS_OF_A_PAGE:,})",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--row", type=_count, metavar="N", help="only the row of this number, from 0")
    choice.add_argument("--refused", action="store_true", help="the rows that are left out or cut, with the reasons")
    choice.add_argument("--longest", action="store_true", help="the longest rows instead of the first")
    choice.add_argument("--sample", type=_count, metavar="K", help="K rows of each side, chosen by data.seed")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser instead, in one file")
    return parser


def _show_rows(choice: Choice, viewer: RowViewer) -> None:
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for row in choice.shown(viewer):
        print(
            f"--- {row.side} row {row.number}: {row.view.tokens():,} tokens, {row.view.supervised_tokens():,} "
            f"supervised; {without_controls(row.origin)}"
        )
        print(coloured(row.view) if colours else bracketed(row.view))


def _show_left_out(data: TokenizedData, side: str | None) -> None:
    count = 0
    for name in ("train", "eval") if side is None else (side,):
        for row in data.left_out(name):
            tokens = "" if row.tokens is None else f" ({row.tokens:,} tokens)"
            place = (
                row.detail if row.detail.startswith(row.origin) else ": ".join(filter(None, (row.origin, row.detail)))
            )
            print(without_controls(f"{name}: {row.reason}{tokens}: {place}"))
            count += 1
    print(f"{count:,} rows are left out or cut")


def _account(data: TokenizedData) -> Iterator[str]:
    """What became of the rows, a line a source."""
    for side in ("train", "eval"):
        report = data.report[side]
        if report is None:
            continue
        for source in report["sources"]:
            lost = "".join(f", {count} refused ({kind})" for kind, count in source["refused"].items())
            lost += "".join(f", {count} dropped ({reason})" for reason, count in source["dropped"].items())
            yield (
                f"{side}: {source['path']} as {source['format']}: {source['rows_kept']:,} of {source['rows']:,} rows, "
                f"{source['tokens']:,} tokens, {source['supervised_tokens']:,} supervised, longest row "
                f"{source['longest_row_tokens']:,}{lost}, {source['truncated']:,} truncated"
            )


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--html {path} cannot be written ({error}); give a file in a folder that exists") from error


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = read_command_line(["--config", arguments.config, *overrides]).config
    folder = token_folder(config.data, config.output)
    tokenizer = load_tokenizer(with_tokenizer(config.model, config.data, cache_folder=folder))
    data = build_datasets(config.data, tokenizer)
    side = "train" if arguments.row is not None and arguments.side is None else arguments.side
    default = ROWS if arguments.html is None else ROWS_OF_A_PAGE
    choice = Choice(
        sides_of(data, side),
        rows=0 if arguments.refused else default if arguments.rows is None else arguments.rows,
        row=arguments.row,
        sample=arguments.sample,
        longest=arguments.longest,
        seed=config.data.seed,
    )
    account = list(_account(data))
    if arguments.html is not None:
        content = page_data(
            data, choice, RowViewer(tokenizer), recipe=arguments.config, config=config.data, account=account
        )
        _write(arguments.html, page(content))
        print(f"{arguments.html}: {len(content['rows']):,} rows, to be opened in a browser")
    elif arguments.refused:
        _show_left_out(data, side)
    else:
        _show_rows(choice, RowViewer(tokenizer))
    print("\n".join(account))


def main() -> int:
    """Run the command; returns its exit code, which is 2 after a mistake in the recipe or the data."""
    arguments, overrides = _parser().parse_known_args()
    set_up_logging()
    disable_progress_bar()
    try:
        _run(arguments, overrides)
    except (ConfigError, UserError) as error:
        tell_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
